"""Disks of overlaybd images that are stored on this host: in layouts, archives and containerd."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from obdlab.errors import SourceError
from obdlab.image.from_manifest import stored_config
from obdlab.image.open import stacked_lowers
from obdlab.layers.budget import Budget
from obdlab.layers.lsmt import open_layer
from obdlab.layers.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.convert.progress import Progress
    from obdlab.formats.oci import Descriptor, Platform
    from obdlab.image.config import ImageConfig
    from obdlab.layers.lsmt import Layer

_COPY = 1 << 20


@contextmanager
def stored_disk(source: ImageSource, platform: Platform) -> Iterator[Stack]:
    """Open the disk of an image for the block. Layers are read where they are stored, and only where they are read.

    Raises SourceError, FormatError, CorruptBlobError, NotOverlaybdError or ImageOpenError.
    """
    manifest = source.manifest(platform, overlaybd=True)
    config = stored_config(manifest, source.name)
    layers: list[Layer] = []
    budget = Budget()
    with ExitStack() as opened:
        for descriptor in manifest.layers[: len(stacked_lowers(config))]:
            blob = source.open_blob(descriptor)
            try:
                layer = open_layer(blob, budget=budget)
            except BaseException:
                blob.close()
                raise
            layers.append(layer)
            opened.callback(layer.close)
        yield Stack(layers)


def config_of_files(source: ImageSource, platform: Platform, place: Path, progress: Progress) -> ImageConfig:
    """Return the configuration of an image whose layers are files of this host.

    Layers that are no files of their own are copied to ``place``, which is made if need be, and checked against their
    digests. Raises as :func:`stored_disk`.
    """
    manifest = source.manifest(platform, overlaybd=True)
    config = stored_config(manifest, source.name)
    lowers = []
    for lower, descriptor in zip(config.lowers, manifest.layers, strict=True):
        path = source.layer_file(descriptor) or _copied(source, descriptor, place, progress)
        lowers.append(replace(lower, file=str(path.absolute()), digest="", size=0))
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
