"""Files of an EROFS that grows: their content, and the places of their inodes."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.formats.lsmt.layout import SECTOR
from obdlab.volumes.erofs import pack
from obdlab.volumes.erofs.pack import BLOCK, INODE_SIZE, SLOT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from obdlab.blob import Buffer
    from obdlab.volumes.erofs.freespace import Space
    from obdlab.volumes.erofs.volume import Inode

# Sparse files of at least this size are stored in chunks, at most _MOST_CHUNKS of them.
_CHUNKED_FROM = 1 << 20
_MOST_CHUNKS = 1 << 14
_LEAST_CHUNK = 64 << 10


@dataclass(slots=True)
class Written:
    """Place of a file's content: layout, first block, tail kept with the inode, chunks."""

    layout: int
    start: int
    tail: bytes = b""
    chunks: list[int] = field(default_factory=list)


class FileWriter:
    """Writes files into ``space``. Raises OSError with the kernel's numbers if a file cannot be stored."""

    def __init__(self, space: Space, *, chunks: bool = False) -> None:
        self._space = space
        #: True if any file is stored in chunks.
        self.chunks = chunks

    def write(self, size: int, pieces: Iterable[tuple[int, Buffer]], room: int, *, sparse: bool) -> Written:
        """Store a file's content, given as (offset, bytes) that ascend; at most ``room`` bytes go with its inode."""
        if sparse and size >= _CHUNKED_FROM:
            return self._write_chunks(size, pieces)
        tail_size = size % BLOCK
        if tail_size > room:
            tail_size = 0
        plain = size - tail_size
        start = self._space.data_blocks(-(-plain // BLOCK)) if plain else 0
        tail = bytearray(tail_size)
        end = 0
        for offset, piece in pieces:
            end = offset + len(piece)
            if offset < plain:
                self._space.write(start * BLOCK + offset, memoryview(piece)[: plain - offset])
            if end > plain:
                begin = max(offset, plain)
                tail[begin - plain : end - plain] = memoryview(piece)[begin - offset :]
        if plain % BLOCK and end >= plain:  # so that the next file's data continue these
            self._space.write(start * BLOCK + plain, bytes(-plain % BLOCK))
        return Written(pack.INLINE if tail_size else pack.PLAIN, start, bytes(tail))

    def map(self, size: int, place: int, end: bytes) -> Written:
        """Store a file of ``size`` bytes that lie in the disk's target from ``place`` on, except for ``end``.

        ``end`` is empty, or the bytes of the file's last sector, which are then written; without it the target's
        sector must have zeros behind the file.
        """
        start = self._space.data_blocks(-(-size // BLOCK)) if size else 0
        mapped = size - len(end) if end else -(-size // SECTOR) * SECTOR
        if mapped:
            self._space.map_at(start * BLOCK, mapped, place)
        if end:
            self._space.write(start * BLOCK + mapped, end.ljust(BLOCK - mapped % BLOCK, b"\0"))
        return Written(pack.PLAIN, start)

    def _write_chunks(self, size: int, pieces: Iterable[tuple[int, Buffer]]) -> Written:
        bits = 0
        while BLOCK << bits < _LEAST_CHUNK or -(-size // (BLOCK << bits)) > _MOST_CHUNKS:
            bits += 1
        chunk = BLOCK << bits
        if bits > 31:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        chunks = [pack.HOLE] * -(-size // chunk)
        for offset, piece in pieces:
            view = memoryview(piece)
            while view:
                index, at = divmod(offset, chunk)
                if chunks[index] == pack.HOLE:
                    chunks[index] = self._space.data_blocks(min(chunk, size - index * chunk + BLOCK - 1) // BLOCK)
                count = min(len(view), chunk - at)
                self._space.write(chunks[index] * BLOCK + at, view[:count])
                offset += count
                view = view[count:]
        self.chunks = True
        return Written(pack.CHUNKED, bits, chunks=chunks)

    def write_inode(
        self, written: Written, body: bytes, *, mode: int, uid: int, gid: int, size: int, mtime_ns: int, links: int
    ) -> int:
        """Place an inode with its extended attributes, as ``pack.xattrs`` gives them; return its number."""
        head = INODE_SIZE + len(body)
        if written.layout == pack.INLINE and head + len(written.tail) > BLOCK:
            self._spill(written, size)
        behind = written.tail + b"".join(block.to_bytes(4, "little") for block in written.chunks)
        at = self._space.place(head + len(behind))
        number = at // SLOT
        raw = pack.inode(
            number,
            mode=mode,
            uid=uid,
            gid=gid,
            size=size,
            mtime_ns=mtime_ns,
            links=links,
            layout=written.layout,
            start=written.start,
            xattrs_size=len(body),
        )
        self._space.change(at, raw + body + behind)
        return number

    def _spill(self, written: Written, size: int) -> None:
        # No room for the tail beside the inode's attributes: all data goes into blocks, copied if need be.
        whole = size // BLOCK
        first = self._space.metadata_blocks(whole + 1)
        for block in range(whole):
            data = self._space.read_at((written.start + block) * BLOCK, BLOCK)
            self._space.change((first + block) * BLOCK, data)
        self._space.change((first + whole) * BLOCK, written.tail.ljust(BLOCK, b"\0"))
        written.layout, written.start, written.tail = pack.PLAIN, first, b""

    def forget(self, inode: Inode) -> None:
        """Free a file's data blocks. The little space of its metadata is not freed."""
        if not stat.S_ISREG(inode.mode):
            return
        if inode.layout == pack.CHUNKED:
            chunk = BLOCK << (inode.start & 31)
            table = self._space.read_at(-(-inode.body // 4) * 4, 4 * chunk_count(inode))
            for index in range(len(table) // 4):
                first = int.from_bytes(table[4 * index : 4 * index + 4], "little")
                if first != pack.HOLE:
                    self._space.discard(first, -(-min(chunk, inode.size - index * chunk) // BLOCK))
            return
        blocks = inode.size // BLOCK if inode.layout == pack.INLINE else -(-inode.size // BLOCK)
        self._space.discard(inode.start, blocks)


def chunk_count(inode: Inode) -> int:
    """Return the number of chunks of a file in that layout."""
    return -(-inode.size // (BLOCK << (inode.start & 31)))
