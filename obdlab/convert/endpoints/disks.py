"""Disks of overlaybd images that are stored on this host: in layouts, archives and containerd."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import SourceError
from obdlab.image.from_manifest import stored_config
from obdlab.image.open import stacked_lowers
from obdlab.image.target import check_target_size, summed, uncompressed_target
from obdlab.image.turboblob import unpack
from obdlab.layers.budget import Budget
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.layers.spancache import SpanCache
from obdlab.layers.stack import Stack
from obdlab.layers.warp import WarpLayer
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.blob import Blob
    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.convert.progress import Progress
    from obdlab.formats.oci import Descriptor, Manifest, Platform
    from obdlab.image.config import ImageConfig
    from obdlab.layers.lsmt import Kind

_COPY = 1 << 20


@contextmanager
def stored_disk(source: ImageSource, platform: Platform) -> Iterator[Stack]:
    """Open the disk of an image for the block. Layers are read where they are stored, and only where they are read.

    Raises SourceError, FormatError, CorruptBlobError, NotOverlaybdError or ImageOpenError.
    """
    manifest = source.manifest(platform, overlaybd=True)
    with tempfile.TemporaryDirectory(prefix="obdlab-image-", dir="/var/tmp") as place, ExitStack() as opened:
        yield Stack(open_layers(source, manifest, Path(place), source.open_blob, opened))


def open_layers(
    source: ImageSource,
    manifest: Manifest,
    place: Path,
    open_blob: Callable[[Descriptor], Blob],
    opened: ExitStack,
) -> list[LsmtLayer]:
    """Open the layers of an image's disk, each of a blob that ``open_blob`` returns. ``opened`` closes them.

    The small blobs of turboOCI layers are unpacked below ``place``. Raises as :func:`stored_disk`.
    """
    config = stored_config(manifest, source.name, partial(unpacked, source, place))
    layers = []
    budget, spans = Budget(), SpanCache(directory=str(place))
    for lower, descriptor in zip(stacked_lowers(config), manifest.layers, strict=False):
        with ExitStack() as unused:
            kind: Kind = LsmtLayer
            if lower.is_turbo:
                stored = unused.enter_context(open_blob(target_of(source, lower.target_digest)))
                check_target_size(stored.name, stored.size, lower)
                target = uncompressed_target(stored, lower.gzip_index, spans)
                unused.callback(target.close)
                target = summed(target, lower, spans)
                unused.callback(target.close)
                kind = partial(WarpLayer, target)
            blob = unused.enter_context(LocalFile(lower.file) if lower.is_turbo else open_blob(descriptor))
            layer = open_layer(blob, budget=budget, kind=kind)
            unused.pop_all()
        opened.callback(layer.close)
        layers.append(layer)
    return layers


def target_of(source: ImageSource, digest: str) -> Descriptor:
    """Return the descriptor of a turboOCI layer's target, a blob beside the image's. Raises SourceError."""
    found = source.beside(digest)
    if found is None:
        raise SourceError("target of a turboOCI layer is not there", blob=f"{source.name}@{digest}")
    return found


def unpacked(source: ImageSource, place: Path, layer: Descriptor) -> Path:
    """Return the directory below ``place`` with the files of a turboOCI layer's blob, fetched at the first call.

    Raises as :func:`stored_disk`.
    """
    directory = place / f"turbo-{layer.digest.removeprefix('sha256:')}"
    if not directory.exists():
        fetched = place / "fetched"
        fetched.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = source.fetch(layer, fetched, lambda _: None)
        try:
            unpack(file, directory, blob=f"{source.name}@{layer.digest}")
        finally:
            source.release(file)
    return directory


def config_of_files(source: ImageSource, platform: Platform, place: Path, progress: Progress) -> ImageConfig:
    """Return the configuration of an image whose layers are files of this host.

    Layers that are no files of their own are copied to ``place``, which is made if need be, and checked against their
    digests. Raises as :func:`stored_disk`.
    """
    manifest = source.manifest(platform, overlaybd=True)
    config = stored_config(manifest, source.name, partial(unpacked, source, place))
    lowers = []
    for lower, descriptor in zip(config.lowers, manifest.layers, strict=True):
        stored = target_of(source, lower.target_digest) if lower.is_turbo else descriptor
        path = str((source.layer_file(stored) or _copied(source, stored, place, progress)).absolute())
        if lower.is_turbo:
            lowers.append(replace(lower, target_file=path, target_digest=""))
        else:
            lowers.append(replace(lower, file=path, digest="", size=0))
    return replace(config, lowers=tuple(lowers))


def _copied(source: ImageSource, layer: Descriptor, place: Path, progress: Progress) -> Path:
    path = place / layer.digest.removeprefix("sha256:")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size == layer.size:  # renamed only when it had been checked
            return path
        with progress.task(f"{source.name}: {layer.digest[:19]}", layer.size) as task:
            file = source.fetch(layer, place, task.advance)
            try:
                with part.open("xb") as copy:
                    while data := file.read(_COPY):
                        copy.write(data)
            finally:
                source.release(file)
        part.rename(path)
    except OSError as error:
        raise SourceError(f"cannot copy the layer: {error.strerror or error}", blob=str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink()
    return path
