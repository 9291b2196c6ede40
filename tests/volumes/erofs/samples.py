"""Small EROFS file systems, made without mkfs.erofs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from obdlab.call import Call
from obdlab.convert.apply import apply_layer
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.volumes.erofs.volume import Volume
from tests.volumes.ext4.samples import MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.blob import Buffer
    from obdlab.volumes.erofs.editor import Editor, File


class CountingDisk(MemoryDisk):
    """A disk that lists its writes and discards."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.writes: list[tuple[int, int]] = []
        self.discards: list[tuple[int, int]] = []

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        super().write_at(offset, data)
        self.writes.append((offset, len(data)))

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        self.data[offset : offset + length] = bytes(length)
        self.discards.append((offset, length))


def add_file(
    editor: Editor,
    name: bytes,
    content: bytes,
    *,
    size: int | None = None,
    pieces: Sequence[tuple[int, Buffer]] | None = None,
    sparse: bool = False,
    xattrs: Sequence[tuple[bytes, bytes]] = (),
) -> File:
    """Add a regular file to the root, in one piece unless ``pieces`` say otherwise."""
    return editor.add_file(
        editor.root, name, mode=0o100644, uid=0, gid=0, mtime_ns=0, xattrs=xattrs, sparse=sparse,
        size=len(content) if size is None else size, pieces=[(0, content)] if pieces is None else pieces,
    )  # fmt: skip


def file_system_of(*layers: bytes) -> bytes:
    """Return the file system of layers (tars), each applied to what those before it made."""
    disk = MemoryDisk(2 << 20)
    for number, layer in enumerate(layers):
        tree = ErofsTree(disk, fresh=not number)
        apply_layer(io.BytesIO(layer), "layer", tree)
        tree.finish()
    volume = Volume(disk)
    return bytes(disk.data[: volume.blocks * volume.block_size])
