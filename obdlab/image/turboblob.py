"""The files in the blob of a turboOCI layer, unpacked: so that an image opens without a client that did it."""

from __future__ import annotations

import errno
import os
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from obdlab.errors import FormatError, SourceError
from obdlab.formats.tar import BLOCK, parse_member
from obdlab.formats.turbofiles import (
    INDEXES,
    MAX_TARGET_FILE,
    SUMS_FILE,
    TARGET_FILE,
    NamedTarget,
    meta_name,
)
from obdlab.image.config import LowerConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.formats.oci import Descriptor

#: File systems whose metadata a blob may have, in the order of preference: every kernel has the first.
FILE_SYSTEMS = ("ext4", "erofs")
_METAS = {name: [meta_name(name, compression) for compression in ("", "zstd")] for name in FILE_SYSTEMS}
_NAMES = (*(file for files in _METAS.values() for file in files), *INDEXES.values(), TARGET_FILE, SUMS_FILE)
# The metadata of a layer of 100 GB: an index of 100,000 windows of 32 KiB, and as much for the file system.
_MOST_UNPACKED = 8 << 30
# A blob has a few. Empty ones compress to less than a byte each, and each takes processor time.
_MOST_MEMBERS = 1000
_COPY = 1 << 20
# Compressed bytes in one read: each piece of content copies the rest of them.
_PIECE = 64 << 10


class Readable(Protocol):
    """A file read from start to end, which checks its digest at the end."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, b"" at the end."""


def unpack(stream: Readable, place: Path, *, blob: str) -> None:
    """Write the known files of the blob read from ``stream`` into the new directory ``place``, whole or not at all.

    Does nothing more if another thread or process has unpacked the blob there meanwhile. A killed process leaves a
    directory ``.unpacking-*`` beside ``place``, which goes with the parent. Other members are ignored, the marker
    among them. Raises FormatError naming ``blob`` if it is no such blob or too large, SourceError if a file cannot be
    written; errors of the stream pass through. Then there is no new directory.
    """
    import tempfile

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".unpacking-", dir=place.parent, ignore_cleanup_errors=True
        ) as temporary:
            files = Path(temporary, "files")  # of its own, so that it has the usual mode
            files.mkdir()
            _unpack(stream, files, blob)
            while stream.read(_COPY):  # to the end, where the digest is checked
                pass
            _put(files, place)
    except OSError as error:
        raise _failed(error, place) from error


# The files were synced when they were written.
def _put(files: Path, place: Path) -> None:
    descriptor = os.open(files, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        files.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # there by now, with the same files
            raise


def _failed(error: OSError, place: Path) -> SourceError:
    return SourceError(f"cannot unpack the blob: {error.strerror or error}", blob=str(place))


def _unpack(stream: Readable, place: Path, blob: str) -> None:
    content = _Gunzipped(stream, blob)
    members = 0
    while (member := parse_member(content.exactly(BLOCK), blob=blob, offset=content.position)) is not None:
        members += 1
        if members > _MOST_MEMBERS:
            what = "blob of a turboOCI layer has too many members"
            raise FormatError(what, blob=blob, wanted=f"at most {_MOST_MEMBERS}")
        name = member.name.decode(errors="replace")
        if content.position + member.size > _MOST_UNPACKED:
            raise FormatError("blob of a turboOCI layer is too large", blob=blob, wanted=f"at most {_MOST_UNPACKED}")
        wanted = name in _NAMES and member.kind in (b"0", b"\0")
        try:
            with (place / name).open("xb") if wanted else nullcontext() as file:
                for at in range(0, member.size, _COPY):
                    data = content.exactly(min(_COPY, member.size - at))
                    if file is not None:
                        file.write(data)
                if file is not None:
                    file.flush()
                    os.fsync(file.fileno())
        except FileExistsError as error:
            raise FormatError("blob of a turboOCI layer has a file twice", blob=blob, got=name) from error
        content.exactly(-member.size % BLOCK)


class _Gunzipped:
    # The content of the stream, which is one gzip member. Memory does not depend on the rate of compression.
    def __init__(self, stream: Readable, blob: str) -> None:
        self._stream = stream
        self._blob = blob
        self._member = zlib.decompressobj(wbits=31)
        self.position = 0

    def exactly(self, size: int) -> bytes:
        parts = []
        left = size
        while left:
            if self._member.eof:
                raise FormatError("blob of a turboOCI layer ends early", blob=self._blob, offset=self.position)
            data = self._member.unconsumed_tail or self._stream.read(_PIECE)
            if not data:
                raise FormatError("gzip data ends early", blob=self._blob, offset=self.position)
            try:
                part = self._member.decompress(data, left)
            except zlib.error as error:
                raise FormatError(f"damaged gzip data ({error})", blob=self._blob, offset=self.position) from error
            parts.append(part)
            left -= len(part)
            self.position += len(part)
        return b"".join(parts)


def file_system_of(places: Sequence[Path], name: str) -> str:
    """Return the file system whose metadata all blobs of an image have. Raises FormatError naming the image."""
    for file_system in FILE_SYSTEMS:
        if all(_file_in(place, _METAS[file_system]) for place in places):
            return file_system
    raise FormatError("turboOCI layers have no file system in common", blob=name, wanted=" or ".join(FILE_SYSTEMS))


def file_systems_in(place: Path) -> list[str]:
    """Return the file systems whose metadata the blob unpacked in ``place`` has."""
    return [name for name in FILE_SYSTEMS if _file_in(place, _METAS[name])]


def lower_of(layer: Descriptor, place: Path, file_system: str) -> LowerConfig:
    """Return the lower of a turboOCI layer unpacked in ``place``; its target is a blob beside it.

    Raises FormatError if the blob names another target than the layer's annotation.
    """
    index = _file_in(place, list(INDEXES.values()))
    named = _named_target(layer, place)
    return LowerConfig(
        file=str(_file_in(place, _METAS[file_system]) or place / meta_name(file_system)),
        target_digest=layer.turbo_target or "",
        target_size=0 if named is None else named.size,
        gzip_index=str(index or ""),
        tar_sums=str(_file_in(place, [SUMS_FILE]) or ""),
    )


def _file_in(place: Path, names: Sequence[str]) -> Path | None:
    return next((place / name for name in names if (place / name).is_file()), None)


# Blobs of the original, and of earlier versions, name none.
def _named_target(layer: Descriptor, place: Path) -> NamedTarget | None:
    try:
        with (place / TARGET_FILE).open("rb") as file:
            data = file.read(MAX_TARGET_FILE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failed(error, place) from error
    named = NamedTarget.parse(data, f"turboOCI layer {layer.digest}")
    if named.digest != layer.turbo_target:
        raise FormatError(
            "annotation of a turboOCI layer names another target than its blob",
            blob=layer.digest,
            got=(layer.turbo_target or "")[:80],
            wanted=named.digest,
        )
    return named
