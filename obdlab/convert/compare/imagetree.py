"""Listing an image path by path, for any way of storage, to compare a converted image with its original."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.apply import apply_layer
from obdlab.convert.compare.listing import list_volume
from obdlab.convert.decompress import uncompressed
from obdlab.convert.endpoints.disks import open_layers
from obdlab.convert.layer import pieces_file
from obdlab.convert.tree.memorytree import MemoryTree
from obdlab.layers.stack import Stack
from obdlab.registry.platform import host_platform
from obdlab.volumes.detect import open_volume

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.convert.compare.listing import TreeEntry
    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.convert.endpoints.layout import VerifiedFile
    from obdlab.convert.progress import Progress
    from obdlab.formats.oci import Descriptor, Manifest, Platform
    from obdlab.layers.lsmt import LsmtLayer

_READ = 1 << 20

Listing = dict[str, "TreeEntry"]


def list_image(
    source: ImageSource, platform: Platform | None, work_dir: Path, progress: Progress, *, content: bool = True
) -> Listing:
    """List an image as :func:`obdlab.convert.compare.listing.list_tree` lists its mount.

    An overlaybd image is read as the file system on its layers, any other by applying its layers in memory. Layers
    are fetched whole, checked against their digests and kept in ``work_dir`` meanwhile. Raises SourceError,
    CorruptBlobError, FormatError or ApplyError.
    """
    manifest = source.manifest(platform or host_platform(), overlaybd=True)
    with tempfile.TemporaryDirectory(prefix="obdlab-compare-", dir=work_dir) as directory:
        if manifest.is_overlaybd:
            return _list_overlaybd(source, manifest, Path(directory), progress, content=content)
        return _list_plain(source, manifest, Path(directory), progress, content=content)


def _list_plain(
    source: ImageSource, manifest: Manifest, work_dir: Path, progress: Progress, *, content: bool
) -> Listing:
    config = source.config(manifest)
    tree = MemoryTree(content=content)
    for number, (layer, diff_id) in enumerate(zip(manifest.layers, config.diff_ids, strict=True)):
        name = f"{source.name} layer {number} ({layer.digest})"
        with ExitStack() as ended:
            file = _fetch(source, number, layer, work_dir, progress, ended)
            with pieces_file(uncompressed(file, name, diff_id)) as tar:
                apply_layer(tar, name, tree)
    return tree.listing()


def _list_overlaybd(
    source: ImageSource, manifest: Manifest, work_dir: Path, progress: Progress, *, content: bool
) -> Listing:
    with ExitStack() as ended:
        layers = fetched_layers(source, manifest, work_dir, progress, ended)
        return list_disk(Stack(layers), content=content)


def list_disk(disk: Blob, *, content: bool = True) -> Listing:
    """List the file system on a disk. Raises FormatError or CorruptBlobError."""
    return list_volume(open_volume(disk), content=content)


def fetched_layers(
    source: ImageSource, manifest: Manifest, work_dir: Path, progress: Progress, ended: ExitStack
) -> list[LsmtLayer]:
    """Fetch the layers of an overlaybd image into ``work_dir``, whole and checked. ``ended`` closes them."""
    numbers = count()

    def fetched(layer: Descriptor) -> Blob:
        file = _fetch(source, next(numbers), layer, work_dir, progress, ended)
        while file.read(_READ):  # reading to the end checks its digest
            pass
        return file.as_blob()

    return open_layers(source, manifest, work_dir, fetched, ended)


def _fetch(
    source: ImageSource, number: int, layer: Descriptor, work_dir: Path, progress: Progress, ended: ExitStack
) -> VerifiedFile:
    directory = work_dir / f"{number:03d}"
    directory.mkdir()
    with progress.task(f"{source.name}: layer {number}", layer.size) as task:
        file = source.fetch(layer, directory, task.advance)
    ended.callback(source.release, file)
    return file
