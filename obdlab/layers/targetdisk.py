"""A disk to build a warp layer on: writes go into the layer itself, contents of files are mapped to its target."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import FormatError, SourceError
from obdlab.formats.lsmt.index import HOLE, SegmentIndex, overlay
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    RECORD_SIZE,
    SECTOR,
    STRUCT_SIZE,
    Flags,
    Header,
    check_order,
    decode_segments,
    encode_segments,
)
from obdlab.formats.lsmt.segmentmap import SegmentMap
from obdlab.formats.lsmt.warp import REMOTE
from obdlab.layers.commit import commit
from obdlab.layers.stack import WritableStack

if TYPE_CHECKING:
    from obdlab.blob import Blob, Buffer
    from obdlab.call import Call
    from obdlab.layers.commit import Committed
    from obdlab.layers.sink import Sink
    from obdlab.layers.stack import Stack
    from obdlab.layers.upper import SparseUpper

# File systems read whole blocks: the rest of a file's last one must be zeros.
_BLOCK_SECTORS = 4096 // SECTOR


class TargetDisk(WritableStack):
    """A :class:`WritableStack` whose topmost layer becomes a warp layer by :meth:`commit`.

    Mapped ranges cannot be read here, since the target may not be at hand yet. A write or a discard ends the mapping
    of the sectors it touches. For one thread.
    """

    def __init__(self, lowers: Stack | None, upper: SparseUpper) -> None:
        super().__init__(lowers, upper)
        self._mapped = SegmentMap(join=True)

    def map_at(self, offset: int, length: int, place: int) -> None:
        """Map the bytes ``[offset, offset + length)`` to those of the target from ``place`` on; all in whole sectors.

        The rest of a last block of 4 KiB then reads as zeros.
        """
        if offset % SECTOR or length % SECTOR or place % SECTOR:
            raise ValueError(f"not whole sectors: {length} bytes at {offset}, from {place} of the target")
        begin, end = offset // SECTOR, (offset + length) // SECTOR
        self._mapped.insert(begin, end, place // SECTOR, tag=REMOTE)
        block_end = -(-end // _BLOCK_SECTORS) * _BLOCK_SECTORS
        if end < block_end:
            if self._holds(end, block_end):
                self._mapped.insert(end, block_end, 0, zeroed=True)
            else:
                self._mapped.remove(end, block_end)

    def _holds(self, begin: int, end: int) -> bool:
        below = [self.upper.lookup(begin, end)]
        if self.lowers is not None:
            below.append(self.lowers.index.lookup(begin, end))
        return any(source != HOLE for runs in below for _, _, source, _ in runs)

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        begin, end = offset // SECTOR, -(-(offset + length) // SECTOR)
        if begin < end and any(source != HOLE for _, _, source, _ in self._mapped.lookup(begin, end)):
            raise SourceError("read of a range that is mapped to the target", blob=self.name, offset=offset)
        return super().read_at(offset, length, call)

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        super().write_at(offset, data, call)
        self._unmap(offset, memoryview(data).nbytes)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        super().discard(offset, length, call)
        self._unmap(offset, length)

    def _unmap(self, offset: int, length: int) -> None:
        self._mapped.remove(offset // SECTOR, -(-(offset + length) // SECTOR))

    def saved_mapping(self) -> bytes:
        """Return the mapped ranges as an index file: a header, and records with the target's tag."""
        header = Header(flags=Flags.HEADER, virtual_size=self.size).to_bytes()
        return header + encode_segments(self._mapped.to_segments())

    def restore_mapping(self, data: bytes) -> None:
        """Map the ranges that :meth:`saved_mapping` returned; of an empty file, none. Raises FormatError."""
        if not data:
            return
        Header.from_bytes(data[:STRUCT_SIZE], blob=self.name)
        if (len(data) - HEADER_SPACE) % RECORD_SIZE:
            raise FormatError("index file ends inside a record", blob=self.name, got=len(data))
        segments = decode_segments(data[HEADER_SPACE:])
        check_order(segments, HEADER_SPACE, blob=self.name)
        if len(segments) and int(segments.end_sectors[-1]) * SECTOR > self.size:
            raise FormatError("index file maps sectors beyond the disk", blob=self.name, wanted=f"{self.size} bytes")
        if not (segments.zeroed | (segments.tag == REMOTE)).all():
            raise FormatError("index file has records of no target (made by the original's tools?)", blob=self.name)
        self._mapped = SegmentMap.of(segments, join=True)

    def commit(self, sink: Sink) -> Committed:
        """Write the topmost layer as a warp layer, without UUIDs as the original does. Raises as :func:`commit`."""
        all_ = overlay(self.upper.index.segments().without_tags(), self._mapped.to_segments())
        remote = (all_.tag == REMOTE) & ~all_.zeroed
        own = replace(all_, tag=np.zeros_like(all_.tag))[~remote]
        layer = _OwnPart(self.name, self.size, SegmentIndex(own), self.upper.data)
        return commit(layer, sink, parent_uuid="", remote=all_[remote])


class _OwnPart:
    # The topmost layer without its mapped sectors, as a Layer to commit.
    uuid = parent_uuid = ""

    def __init__(self, name: str, virtual_size: int, index: SegmentIndex, data: Blob) -> None:
        self.name, self.virtual_size, self.index, self.data = name, virtual_size, index, data

    def close(self) -> None:
        """Leave the file to the disk."""
