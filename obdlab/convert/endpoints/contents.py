"""One piece of an image: manifest, config, layer, or any blob stored beside them."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import FormatError, OutOfRangeError
from obdlab.formats.oci import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_CONFIG_SIZE,
    MAX_MANIFEST_SIZE,
    Descriptor,
    Index,
    is_digest,
)

if TYPE_CHECKING:
    from typing import BinaryIO

    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.convert.progress import Progress
    from obdlab.formats.oci import Platform

INDEX, MANIFEST, CONFIG = "index", "manifest", "config"
_COPY = 1 << 20


def find_piece(source: ImageSource, what: str, platform: Platform) -> Descriptor:
    """Return the descriptor of one piece of the image.

    ``what`` is "index" (the document of any kind that the image's name refers to), "manifest" or "config" (those for
    ``platform``), a layer's number counted from 0 at the bottom, or a digest. Raises FormatError if there is no such
    piece.
    """
    if is_digest(what) and (beside := source.beside(what)):
        return beside
    descriptor, root = source.root()
    if what == INDEX:
        if descriptor is None:
            raise FormatError("several images have this name, and no index", blob=source.name, wanted=MANIFEST)
        return descriptor
    known = [] if descriptor is None else [descriptor]
    known += root.manifests if isinstance(root, Index) else []
    if is_digest(what) and (found := _with_digest(known, what)):
        return found
    descriptor, manifest = source.find(platform, overlaybd=True)
    if what == MANIFEST:
        return descriptor
    if what == CONFIG:
        return manifest.config
    if is_digest(what):
        found = _with_digest([descriptor, manifest.config, *manifest.layers], what)
        if found is None:
            raise FormatError("nothing here has this digest", blob=source.name, got=what)
        return found
    if not (what.isascii() and what.isdecimal() and len(what) < 6 and int(what) < len(manifest.layers)):
        wanted = f"{INDEX}, {MANIFEST}, {CONFIG}, a digest, or a layer's number from 0 to {len(manifest.layers) - 1}"
        raise FormatError("no such piece", blob=source.name, got=repr(what), wanted=wanted)
    return manifest.layers[int(what)]


def _with_digest(descriptors: list[Descriptor], digest: str) -> Descriptor | None:
    return next((each for each in descriptors if each.digest == digest), None)


def is_document(descriptor: Descriptor, what: str) -> bool:
    """Return True if the piece is JSON for people to read."""
    return what == CONFIG or descriptor.media_type in (*MANIFEST_TYPES, *INDEX_TYPES)


def copy_piece(source: ImageSource, descriptor: Descriptor, what: str, sink: BinaryIO, progress: Progress) -> None:
    """Write a whole piece into ``sink``. Its bytes are only known to be right when this returns.

    Raises SourceError, or CorruptBlobError if it does not match its size or digest.
    """
    if is_document(descriptor, what):
        limit = MAX_CONFIG_SIZE if what == CONFIG else MAX_MANIFEST_SIZE
        sink.write(source.read(descriptor, limit))
        return
    with tempfile.TemporaryDirectory(prefix="obdlab-blob-", dir="/var/tmp") as directory:
        with progress.task(descriptor.digest[:19], descriptor.size) as task:
            file = source.fetch(descriptor, Path(directory), task.advance)
        try:
            while data := file.read(_COPY):
                sink.write(data)
        finally:
            source.release(file)


def copy_range(source: ImageSource, descriptor: Descriptor, begin: int, end: int | None, sink: BinaryIO) -> int:
    """Write the bytes ``[begin, end)`` of a piece into ``sink``, all to the end without ``end``; return their number.

    The bytes are not checked. Raises SourceError, or OutOfRangeError if the piece is shorter.
    """
    with closing(source.open_blob(descriptor)) as blob:
        stop = blob.size if end is None else end
        if not begin <= stop <= blob.size:
            raise OutOfRangeError(
                f"{blob.name}: no such range (got [{begin}, {stop}), wanted inside [0, {blob.size}))"
            )
        sink.writelines(blob.read_at(offset, min(_COPY, stop - offset)) for offset in range(begin, stop, _COPY))
    return stop - begin
