"""One layer's tar applied to the writable layer of an image configuration, in user space: no device, no mount."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from obdlab.convert.apply import ApplyError, apply_layer
from obdlab.convert.decompress import decompressed
from obdlab.convert.layer import pieces_file
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.convert.tree.target import Ext4Tree
from obdlab.errors import SourceError
from obdlab.formats.compression import MAGIC_SIZE, compression_of
from obdlab.image.config import ImageConfig, UpperConfig
from obdlab.image.open import WritableImage, open_image
from obdlab.layerfiles.turbolayer import opened_target_disk
from obdlab.layers.gzipwriter import GzipIndexWriter
from obdlab.layers.rawfile import RawFile
from obdlab.system.newfile import new_file
from obdlab.system.superblock import SUPERBLOCK_END, kind_of
from obdlab.volumes.ext4.mkfs import make_filesystem

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from obdlab.blob import Buffer, WritableBlob
    from obdlab.convert.apply import ApplyStatistics
    from obdlab.image.open import Image
    from obdlab.settings.settings import Settings


@contextmanager
def opened_tar(path: str, gzip_index: str = "") -> Iterator[Iterable[bytes]]:
    """Give the uncompressed content of a layer's file or pipe (gzip, zstd or plain) in pieces, for the block.

    Of a gzip layer, the file ``gzip_index``, if named, becomes the index while the content is read. Raises
    SourceError if the file cannot be opened; the pieces raise FormatError or CorruptBlobError.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise SourceError(f"cannot be opened ({error.strerror})", blob=path) from error
    with file:
        if not gzip_index or compression_of(file.peek(MAGIC_SIZE)[:MAGIC_SIZE]) != "gzip":
            yield decompressed(file, path)
            return
        with new_file(gzip_index, force=True) as sink:
            yield GzipIndexWriter(sink, blob=path, several=False).decompressed(file)


def apply_to_config(
    tar: Iterable[Buffer], name: str, config: str | os.PathLike[str], settings: Settings, *, mkfs: bool = False
) -> ApplyStatistics:
    """Apply a layer's uncompressed ``tar`` to the image of a ``config.v1.json``, which has a writable layer.

    ``name`` is the tar's in errors; ``mkfs`` makes an ext4 first. Raises FormatError for a malformed tar, ApplyError
    if the tree refuses it or the disk has no file system that can be written, and the errors of opening the image
    and of ``tar``. The writable layer is then half changed: throw it away.
    """
    image = open_image(config, settings, traces=False)
    with image:
        if not isinstance(image, WritableImage):
            raise ApplyError(f"{config}: the configuration has no writable layer (upper) to apply the tar to")
        return _apply(tar, name, image, mkfs=mkfs)


def apply_to_raw(tar: Iterable[Buffer], name: str, path: str | os.PathLike[str], *, mkfs: bool) -> ApplyStatistics:
    """Apply a layer's uncompressed ``tar`` to the file system in a raw disk image. Raises as apply_to_config."""
    with RawFile(path) as disk:
        return _apply(tar, name, disk, mkfs=mkfs)


def apply_as_turbo(
    tar: Iterable[Buffer],
    name: str,
    config: str | os.PathLike[str],
    settings: Settings,
    *,
    filesystem: str = "ext4",
    mkfs: bool = False,
) -> ApplyStatistics:
    """Apply a layer's uncompressed ``tar`` to a turboOCI layer in the making: contents of files stay in the tar.

    The configuration's upper is one of ``overlaybd-create --turboOCI``, its lowers are turboOCI layers with their
    targets. Raises as :func:`apply_to_config`.
    """
    image = ImageConfig.load(config)
    if not image.upper.active:
        raise ApplyError(f"{config}: the configuration has no writable layer (upper) to apply the tar to")
    with ExitStack() as opened:
        lowers = None
        if image.lowers:
            below = replace(image, upper=UpperConfig(), result_file="")
            lowers = opened.enter_context(cast("Image", open_image(below, settings, traces=False)))
        disk = opened.enter_context(opened_target_disk(image.upper.data, image.upper.index, lowers))
        if filesystem == "erofs":
            tree: Ext4Tree | ErofsTree = ErofsTree(disk, fresh=lowers is None)
            applied = apply_layer(pieces_file(tar), name, tree)
            tree.finish()
            return applied
        return _apply(tar, name, disk, mkfs=mkfs)


def _apply(tar: Iterable[Buffer], name: str, disk: WritableBlob, *, mkfs: bool) -> ApplyStatistics:
    if mkfs:
        make_filesystem(disk)
    kind = kind_of(disk.read_at(0, min(SUPERBLOCK_END, disk.size)))
    if kind not in ("ext4", "erofs"):
        raise ApplyError(f"{disk.name}: the disk has no file system that can be written here (got {kind or 'none'})")
    tree = Ext4Tree(disk) if kind == "ext4" else ErofsTree(disk, fresh=False)
    applied = apply_layer(pieces_file(tar), name, tree)
    tree.finish()
    disk.flush()
    return applied
