"""Small EROFS file systems, made without mkfs.erofs."""

from __future__ import annotations

import io

from obdlab.convert.apply import apply_layer
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.volumes.erofs.volume import Volume
from tests.volumes.ext4.samples import MemoryDisk


def file_system_of(*layers: bytes) -> bytes:
    """Return the file system of layers (tars), each applied to what those before it made."""
    disk = MemoryDisk(2 << 20)
    for number, layer in enumerate(layers):
        tree = ErofsTree(disk, fresh=not number)
        apply_layer(io.BytesIO(layer), "layer", tree)
        tree.finish()
    volume = Volume(disk)
    return bytes(disk.data[: volume.blocks * volume.block_size])
