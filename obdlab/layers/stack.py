"""Layers stacked into one disk: read-only, and with a writable layer on top."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from obdlab.blob import Blob, WritableBlob, check_range
from obdlab.errors import FormatError
from obdlab.formats.lsmt.index import HOLE, MAX_LAYERS, SegmentIndex, merge
from obdlab.formats.lsmt.layout import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Buffer
    from obdlab.formats.lsmt.index import Run
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.upper import SparseUpper

_SHIFT = SECTOR.bit_length() - 1
_MASK = SECTOR - 1
# Answers of the usual lengths cost nothing; untouched, they also take no memory.
_ZEROS = {1 << bits: bytes(1 << bits) for bits in range(9, 21)}
_ZERO_VIEW = memoryview(_ZEROS[1 << 20])

# Number of the part of an answer that a piece of a larger read is, and its range in that read.
_Piece = tuple[int, int, int]


def zeros(length: int) -> bytes:
    """``length`` zero bytes, shared if it is a usual request length."""
    found = _ZEROS.get(length)
    return bytes(length) if found is None else found


class Stack(Blob):
    """The read-only merged view of ``[bottom, ..., top]``, at most 255 layers.

    Its size is the first virtual size that is not 0, from the top down. Reads go by byte; sectors that no layer
    holds read as zeros. The layers belong to the stack and are closed with it.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        if not 1 <= len(layers) <= MAX_LAYERS:
            raise FormatError("a stack cannot be made", got=f"{len(layers)} layers", wanted=f"1 to {MAX_LAYERS}")
        self.layers = tuple(layers)
        self.name = layers[-1].name if len(layers) == 1 else f"stack of {len(layers)} layers up to {layers[-1].name}"
        self._size = next((layer.virtual_size for layer in reversed(layers) if layer.virtual_size), 0)
        #: The merged index: tag 0 is the topmost layer, as in :attr:`blobs`.
        self.index: SegmentIndex = merge([layer.index for layer in layers])
        self.blobs: tuple[Blob, ...] = tuple(layer.data for layer in reversed(layers))
        self._lookup = self.index.lookup
        self._reads = tuple(blob.read_at for blob in self.blobs)

    @property
    def size(self) -> int:
        return self._size

    @property
    def parent_uuid(self) -> str:
        """The bottom layer's parent."""
        return self.layers[0].parent_uuid

    def read_at(self, offset: int, length: int) -> bytes:
        end = offset + length
        if offset < 0 or length < 0 or end > self._size:
            check_range(self, offset, length)
        runs = self._lookup(offset >> _SHIFT, (end + _MASK) >> _SHIFT)
        if len(runs) == 1:
            _, _, source, moffset = runs[0]
            if source < 0:
                return zeros(length)
            return self._reads[source]((moffset << _SHIFT) + (offset & _MASK), length)
        return self._gather(runs, offset, end)

    def _gather(self, runs: list[Run], offset: int, end: int) -> bytes:
        # Several runs as one answer. Packed files hold their data in disk order, so that runs of one layer with
        # nothing but zeros between them often continue each other there: those are one read.
        parts: list[Buffer] = []
        group: list[_Piece] = []
        group_source, group_at, group_end = -1, 0, 0
        for begin, count, source, moffset in runs:
            start = begin << _SHIFT
            stop = start + (count << _SHIFT)
            if start < offset:
                start = offset
            if stop > end:
                stop = end
            size = stop - start
            if source < 0:
                parts.append(_ZERO_VIEW[:size] if size <= len(_ZERO_VIEW) else bytes(size))
                continue
            at = ((moffset - begin) << _SHIFT) + start
            if source != group_source or at != group_end:
                if group:
                    self._read_group(parts, group, group_source, group_at, group_end)
                group = []
                group_source, group_at = source, at
            group_end = at + size
            group.append((len(parts), at - group_at, group_end - group_at))
            parts.append(b"")
        if group:
            self._read_group(parts, group, group_source, group_at, group_end)
        return b"".join(parts)

    def _read_group(self, parts: list[Buffer], group: list[_Piece], source: int, at: int, end: int) -> None:
        data = self._reads[source](at, end - at)
        if len(group) == 1:
            parts[group[0][0]] = data
            return
        view = memoryview(data)
        for place, begin, stop in group:
            parts[place] = view[begin:stop]

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        for _, count, source, moffset in self._lookup(offset >> _SHIFT, (offset + length + _MASK) >> _SHIFT):
            if source >= 0:
                self.blobs[source].evict(moffset << _SHIFT, count << _SHIFT)

    def close(self) -> None:
        for layer in self.layers:
            layer.close()


class WritableStack(WritableBlob):
    """A writable layer over a read-only stack (or over nothing).

    Reads take what the upper layer holds and fill the gaps from the lowers. Its size is the upper layer's; an upper
    layer made with size 0 takes on the lowers' size here. Both belong to the stack and are closed with it.

    The upper layer's file remembers what was written only as allocated blocks, so that the stack takes care of two
    things a reopening would get wrong: a write that fills a block partly, over data of a lower layer, stores the
    whole block; and a discard over data of a lower layer stores zeros instead of a hole.
    """

    def __init__(self, lowers: Stack | None, upper: SparseUpper) -> None:
        self.lowers = lowers
        self.upper = upper
        if not upper.virtual_size and lowers is not None:
            upper.set_virtual_size(lowers.size)
        self.name = upper.name
        self._size = upper.virtual_size
        self._lowers_size = min(lowers.size, self._size) if lowers is not None else 0
        self._change = threading.Lock()

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        end = offset + length
        if offset < 0 or length < 0 or end > self._size:
            check_range(self, offset, length)
        runs = self.upper.lookup(offset >> _SHIFT, (end + _MASK) >> _SHIFT)
        if len(runs) == 1:
            return self._read_run(runs[0][2], offset, length)
        parts = []
        for begin, count, source, _ in runs:
            start = max(begin << _SHIFT, offset)
            parts.append(self._read_run(source, start, min((begin + count) << _SHIFT, end) - start))
        return b"".join(parts)

    def _read_run(self, source: int, offset: int, length: int) -> bytes:
        if source >= 0:
            return self.upper.read_at(offset, length)
        if self.lowers is None or source != HOLE:
            return zeros(length)
        below = min(length, max(0, self._lowers_size - offset))
        if below == length:
            return self.lowers.read_at(offset, length)
        return (self.lowers.read_at(offset, below) if below else b"") + zeros(length - below)

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        check_range(self, offset, len(view))
        if len(view):
            with self._change:
                self._write(offset, view)

    def _write(self, offset: int, view: memoryview) -> None:
        block = self.upper.block_size
        end = offset + len(view)
        if self.lowers is not None and (offset % block or end % block):
            begin_block, end_block = offset - offset % block, min(self._size, -(-end // block) * block)
            head = self._kept(begin_block, offset)
            tail = self._kept(end, end_block)
            if head or tail:
                self.upper.write_at(offset - len(head), b"".join((head, view, tail)))
                return
        self.upper.write_at(offset, view)

    def _kept(self, begin: int, end: int) -> bytes:
        # What must be stored along with a write beside it, to fill up a block: the bytes [begin, end) if a lower
        # layer shows through there, else none.
        if begin >= end:
            return b""
        for run_begin, count, source, _ in self.upper.lookup(begin >> _SHIFT, (end + _MASK) >> _SHIFT):
            if source == HOLE and next(self._lower_data(run_begin << _SHIFT, (run_begin + count) << _SHIFT), None):
                return self.read_at(begin, end - begin)
        return b""

    def _lower_data(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        # The byte ranges in [begin, end) where a lower layer holds data, at sector granularity.
        if self.lowers is None:
            return
        end = min(end, self._lowers_size)
        if begin >= end:
            return
        for run_begin, count, source, _ in self.lowers.index.lookup(begin >> _SHIFT, (end + _MASK) >> _SHIFT):
            if source >= 0:
                yield max(begin, run_begin << _SHIFT), min(end, (run_begin + count) << _SHIFT)

    def discard(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        end = offset + length
        with self._change:
            for begin, stop in self._lower_data(offset, end):
                for at in range(begin, stop, len(_ZERO_VIEW)):
                    self._write(at, _ZERO_VIEW[: min(stop - at, len(_ZERO_VIEW))])
                if offset < begin:
                    self._punch(offset, begin)
                offset = stop
            if offset < end:
                self._punch(offset, end)

    def _punch(self, begin: int, end: int) -> None:
        self.upper.discard(begin, end - begin)

    def flush(self) -> None:
        self.upper.flush()

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if self.lowers is not None and offset < self._lowers_size:
            self.lowers.evict(offset, min(length, self._lowers_size - offset))

    def close(self) -> None:
        self.upper.close()
        if self.lowers is not None:
            self.lowers.close()
