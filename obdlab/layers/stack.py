"""Layers stacked into one disk: read-only, and with a writable layer on top."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from obdlab.blob import Blob, WritableBlob, check_range
from obdlab.errors import FormatError, OutOfRangeError, SourceError
from obdlab.formats.lsmt.index import HOLE, MAX_LAYERS, LayeredIndex, SegmentIndex, add_on_top, merge
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.layers.budget import MOST_SEGMENTS
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.seal import SwitchMark
from obdlab.layers.upperstate import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from obdlab.blob import Buffer
    from obdlab.call import Call
    from obdlab.formats.lsmt.index import Run
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.writable import Upper

    ReadAt = Callable[[int, int, Call | None], bytes]

logger = logging.getLogger(__name__)

_SHIFT = SECTOR.bit_length() - 1
_MASK = SECTOR - 1
# Zeros of the usual lengths are made once. The pages are written, not merely allocated: the kernel copies an answer
# out of a FUSE server's memory, and if it must fault a page in while that server is killed, it fails the request
# instead of passing it to the next server.
_ZEROS = {1 << bits: b"\0" * (1 << bits) for bits in range(9, 21)}
_ZERO_VIEW = memoryview(_ZEROS[1 << 20])

# A restack flushes until a flush is shorter than this, at most _FLUSHES times, before writes begin to wait.
_SHORT_FLUSH_S = 0.02
_FLUSHES = 5

# A piece of a larger read: the number of its part of the answer, and its range in that read.
_Piece = tuple[int, int, int]


def zeros(length: int) -> bytes:
    """Return ``length`` zero bytes, a shared object for usual request lengths."""
    found = _ZEROS.get(length)
    return b"\0" * length if found is None else found


class Stack(Blob):
    """The read-only merged view of ``[bottom, ..., top]``, at most 255 layers.

    Its size is the first virtual size that is not 0, from the top down. Reads may have any byte range; sectors that
    no layer holds read as zeros. The layers belong to the stack and are closed with it.
    """

    def __init__(self, layers: Sequence[Layer], *, index: SegmentIndex | None = None) -> None:
        """Stack ``layers``. ``index``, if given, must equal the merge of their indexes."""
        if not 1 <= len(layers) <= MAX_LAYERS:
            raise FormatError("a stack cannot be made", got=f"{len(layers)} layers", wanted=f"1 to {MAX_LAYERS}")
        if index is None:
            # Writable layers do not count: they are this machine's own.
            segments = sum(len(layer.index) for layer in layers if isinstance(layer, LsmtLayer))
            if segments > MOST_SEGMENTS:
                what = "a stack has too many segments"
                raise FormatError(what, blob=layers[-1].name, got=segments, wanted=f"at most {MOST_SEGMENTS}")
        self.layers = tuple(layers)
        self.name = layers[-1].name if len(layers) == 1 else f"stack of {len(layers)} layers up to {layers[-1].name}"
        self._size = next((layer.virtual_size for layer in reversed(layers) if layer.virtual_size), 0)
        #: The merged index: tag 0 is the topmost layer, as in :attr:`blobs`.
        self.index: SegmentIndex = merge([layer.index for layer in layers]) if index is None else index
        self.blobs: tuple[Blob, ...] = tuple(layer.data for layer in reversed(layers))
        self._lookup = self.index.lookup
        self._find = self.index.find
        self._sources, self._shifts = self.index.sources, self.index.shifts
        self._reads: tuple[ReadAt, ...] = tuple(blob.read_at for blob in self.blobs)
        self._fills = tuple(blob.read_into for blob in self.blobs)
        #: True while :meth:`watch` is on.
        self.watched = False

    def watch(self, around: Callable[[int, ReadAt], ReadAt] | None) -> None:
        """Read each layer through ``around(its number, its read_at)``, 0 being the bottom; None ends that.

        Costs nothing while it is off.
        """
        self.watched = around is not None
        top = len(self.blobs) - 1
        reads = [blob.read_at for blob in self.blobs]
        self._reads = tuple(read if around is None else around(top - tag, read) for tag, read in enumerate(reads))

    @property
    def size(self) -> int:
        return self._size

    @property
    def parent_uuid(self) -> str:
        """The bottom layer's parent."""
        return self.layers[0].parent_uuid

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        end = offset + length
        if offset < 0 or length < 0 or end > self._size:
            check_range(self, offset, length)
        if not length:
            return b""
        i = self._find(offset >> _SHIFT, (end + _MASK) >> _SHIFT)
        if i >= 0:  # nearly every small read
            source = self._sources[i]
            at = offset + (self._shifts[i] << _SHIFT)
            return self._reads[source](at, length, call) if source >= 0 else zeros(length)
        runs = self._lookup(offset >> _SHIFT, (end + _MASK) >> _SHIFT)
        if len(runs) == 1 and runs[0][2] < 0:
            return zeros(length)
        return self._gather(runs, offset, end, call)

    def read_into(self, offset: int, out: memoryview, call: Call | None = None) -> None:
        length = len(out)
        end = offset + length
        if offset >= 0 and length > 0 and end <= self._size and not self.watched:
            i = self._find(offset >> _SHIFT, (end + _MASK) >> _SHIFT)
            if i >= 0 and self._sources[i] >= 0:
                self._fills[self._sources[i]](offset + (self._shifts[i] << _SHIFT), out, call)
                return
        out[:] = self.read_at(offset, length, call)

    def _gather(self, runs: list[Run], offset: int, end: int, call: Call | None) -> bytes:
        # Several runs as one answer. Packed files hold their data in disk order, so runs of one layer with only zeros
        # between them often continue each other there: these become one read.
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
                    self._read_group(parts, group, group_source, group_at, group_end, call)
                group = []
                group_source, group_at = source, at
            group_end = at + size
            group.append((len(parts), at - group_at, group_end - group_at))
            parts.append(b"")
        if group:
            self._read_group(parts, group, group_source, group_at, group_end, call)
        return b"".join(parts)

    def _read_group(
        self, parts: list[Buffer], group: list[_Piece], source: int, at: int, end: int, call: Call | None
    ) -> None:
        data = self._reads[source](at, end - at, call)
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


@dataclass(frozen=True, slots=True)
class Restacked:
    """The layer that a restack has sealed, which belongs to the stack, and the time that writes had to wait."""

    layer: LsmtLayer
    paused_s: float


class WritableStack(WritableBlob):
    """A writable layer over a read-only stack (or over nothing).

    Reads take the ranges the upper layer holds and fill the gaps from the lowers. Its size is the upper layer's; an
    upper layer made with size 0 takes on the lowers' size here. Both belong to the stack and are closed with it.

    A sparse upper layer's file remembers written ranges only as allocated blocks. So the stack handles two cases that
    reopening would get wrong: a write that covers a block partly, over data of a lower layer, stores the whole block;
    and a discard over data of a lower layer stores zeros instead of a hole. For an append-mode upper layer, whose
    unit is the sector, it fills up sectors.
    """

    def __init__(self, lowers: Stack | None, upper: Upper) -> None:
        if not upper.virtual_size and lowers is not None:
            upper.set_virtual_size(lowers.size)
        self.name = upper.name
        self._size = upper.virtual_size
        self._view = (upper, lowers)  # what a read works on, replaced as one value
        self._change = threading.Lock()
        #: Held by a snapshot from looking at the layers until they have changed.
        self.snapshotting = threading.Lock()
        self._restacking = threading.Lock()
        self._unmerged: tuple[Upper, Stack | None] | None = None  # sealed by a restack, and the lowers before it

    @property
    def upper(self) -> Upper:
        """The layer that takes the writes."""
        return self._view[0]

    @property
    def lowers(self) -> Stack | None:
        """The layers below it."""
        return self._view[1]

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        end = offset + length
        if offset < 0 or length < 0 or end > self._size:
            check_range(self, offset, length)
        upper, lowers = self._view
        pieces = upper.read_held(offset, length)
        if len(pieces) == 1:
            data = pieces[0][1]
            return _read_below(lowers, offset, length, call) if data is None else data
        parts = []
        for size, data in pieces:
            parts.append(_read_below(lowers, offset, size, call) if data is None else data)
            offset += size
        return b"".join(parts)

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        view = memoryview(data).cast("B")
        check_range(self, offset, len(view))
        if len(view):
            with self._change:
                self._write(offset, view, call)

    def _write(self, offset: int, view: memoryview, call: Call | None) -> None:
        upper, lowers = self._view
        block = upper.block_size
        end = offset + len(view)
        if (offset % block or end % block) and (lowers is not None or not upper.takes_partial_blocks):
            begin_block, end_block = offset - offset % block, min(self._size, -(-end // block) * block)
            head = self._kept(begin_block, offset, call)
            tail = self._kept(end, end_block, call)
            if head or tail:
                upper.write_at(offset - len(head), b"".join((head, view, tail)))
                return
        upper.write_at(offset, view)

    def _kept(self, begin: int, end: int, call: Call | None) -> bytes:
        # The bytes [begin, end) that must be stored along with a write beside them, to fill up a block. Empty unless
        # a lower layer shows through there or the upper layer takes whole blocks only.
        if begin >= end:
            return b""
        if not self.upper.takes_partial_blocks:
            return self.read_at(begin, end - begin, call)
        for run_begin, count, source, _ in self.upper.lookup(begin >> _SHIFT, (end + _MASK) >> _SHIFT):
            if source == HOLE and next(self._lower_data(run_begin << _SHIFT, (run_begin + count) << _SHIFT), None):
                return self.read_at(begin, end - begin, call)
        return b""

    def _lower_data(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        # Yields the byte ranges in [begin, end) where a lower layer holds data, at sector granularity.
        lowers = self.lowers
        if lowers is None:
            return
        end = min(end, lowers.size)
        if begin >= end:
            return
        for run_begin, count, source, _ in lowers.index.lookup(begin >> _SHIFT, (end + _MASK) >> _SHIFT):
            if source >= 0:
                yield max(begin, run_begin << _SHIFT), min(end, (run_begin + count) << _SHIFT)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        check_range(self, offset, length)
        end = offset + length
        with self._change:
            if self.upper.discard_hides:
                self._discard_blocks(offset, end, call)
                return
            for begin, stop in self._lower_data(offset, end):
                self._write_zeros(begin, stop, call)
                if offset < begin:
                    self.upper.discard(offset, begin - offset)
                offset = stop
            if offset < end:
                self.upper.discard(offset, end - offset)

    def _discard_blocks(self, offset: int, end: int, call: Call | None) -> None:
        # Discards whole blocks and overwrites the parts beside them with zeros.
        block = self.upper.block_size
        begin, stop = -(-offset // block) * block, end // block * block
        if begin >= stop:
            self._write_zeros(offset, end, call)
            return
        self._write_zeros(offset, begin, call)
        self.upper.discard(begin, stop - begin)
        self._write_zeros(stop, end, call)

    def _write_zeros(self, begin: int, end: int, call: Call | None) -> None:
        for at in range(begin, end, len(_ZERO_VIEW)):
            self._write(at, _ZERO_VIEW[: min(end - at, len(_ZERO_VIEW))], call)

    def flush(self) -> None:
        self.upper.flush()

    def set_virtual_size(self, virtual_size: int) -> None:
        """Grow the disk: the new part reads as zeros. Raises OutOfRangeError if it would shrink."""
        with self._restacking, self._change:
            if self.lowers is not None and self.lowers.size > self._size:
                raise OutOfRangeError(f"{self.name}: a disk smaller than its lowers ({self.lowers.size}) cannot grow")
            self.upper.set_virtual_size(virtual_size)
            self._size = virtual_size

    def restack(self, upper: Upper, switch: Callable[[], None] | None = None) -> Restacked:
        """Snapshot the disk live: seal the writable layer in place, make it the topmost lower, continue in ``upper``.

        ``upper`` must be empty; made with size 0, it takes on this disk's size. Reads go on meanwhile, writes wait
        for the seal. ``switch`` is called when the seal is on stable storage and nothing has been written to
        ``upper`` yet: it must replace the old configuration by the one that names the new layers. If it raises, or a
        crash comes before it is done, the old layer is the writable one, as before: opening it undoes the seal.

        Raises FormatError if there are 255 lowers already or the layer cannot be sealed; then nothing has changed.
        ``upper`` stays the caller's after any error for which :attr:`upper` is still the old layer.
        """
        with self._restacking:
            self._merge_sealed()
            paused_s = self._go_on_in(upper, switch)
            layer = self._merge_sealed()
            assert layer is not None
            return Restacked(layer, paused_s)

    def _go_on_in(self, upper: Upper, switch: Callable[[], None] | None) -> float:
        old, lowers = self._view
        layers = () if lowers is None else lowers.layers
        if upper.virtual_size not in (0, self._size) or len(upper.index):
            raise FormatError("layer to go on in is not an empty one of the disk's size", blob=upper.name)
        if len(layers) >= MAX_LAYERS:
            raise FormatError("a stack is full", blob=self.name, got=f"{len(layers)} lowers", wanted="one less")
        _check_ends(lowers, self._size)
        if not upper.virtual_size:
            upper.set_virtual_size(self._size)
        upper.flush()
        # Most of the work happens now, while no write waits: the second time costs only the changes since.
        old.prepare_to_seal()
        _flush_until_short(old)
        mark = SwitchMark(old.data.name)
        mark.put()
        with self._change:
            began = time.monotonic()
            try:
                old.seal_file(marked=True)
                try:
                    if switch is not None:
                        switch()
                except BaseException:
                    old.unseal()
                    raise
            except BaseException:
                if old.state is not State.SEALED:  # else the next opening must undo the seal
                    mark.remove()
                raise
            below = LayeredIndex(None if lowers is None else lowers.index, old.lookup)
            # The stack below is only used for lookups until the index is merged.
            self._view = (upper, Stack([*layers, old], index=cast("SegmentIndex", below)))
            self._unmerged = (old, lowers)
            paused_s = time.monotonic() - began
        try:
            mark.remove()
        except SourceError as error:  # the next opening of the new stack removes it
            logger.warning("%s", error)
        old.retire()
        return paused_s

    def _merge_sealed(self) -> LsmtLayer | None:
        # The part of a restack left for later: opens the sealed layer as such, and merges one index for all lowers.
        if self._unmerged is None:
            return None
        old, lowers = self._unmerged
        sealed = LsmtLayer(old.data)
        index = sealed.index if lowers is None else add_on_top(lowers.index, sealed.index)
        layers = () if lowers is None else lowers.layers
        with self._change:
            self._view = (self.upper, Stack([*layers, sealed], index=index))
            self._unmerged = None
        return sealed

    def as_layers(self) -> Stack:
        """Return the same disk as a read-only stack of all layers, which still belong to this stack.

        It shows the upper layer as it is now; valid until that layer is changed or collected. Raises FormatError if
        the disk is larger than lowers that have data beyond their end.
        """
        _check_ends(self.lowers, self._size)
        layers: list[Layer] = [] if self.lowers is None else list(self.lowers.layers)
        return Stack([*layers, self.upper])

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        lowers = self.lowers
        if lowers is not None and offset < lowers.size:
            lowers.evict(offset, min(length, lowers.size - offset))

    def close(self) -> None:
        self.upper.close()
        if self.lowers is not None:
            self.lowers.close()


# In a stack of all layers, which is as large as the upper one, data of a lower that lies beyond the end of those
# above it would come back.
def _check_ends(lowers: Stack | None, size: int) -> None:
    if lowers is not None and size > lowers.size and lowers.index.end_sectors * SECTOR > lowers.size:
        raise FormatError(
            "lowers have data beyond their end, which a larger disk of all layers would show", blob=lowers.name
        )


def _flush_until_short(upper: Upper) -> None:
    for _ in range(_FLUSHES):
        began = time.monotonic()
        upper.flush()
        if time.monotonic() - began < _SHORT_FLUSH_S:
            return


def _read_below(lowers: Stack | None, offset: int, length: int, call: Call | None) -> bytes:
    # The bytes of the lowers, which may be smaller than the disk.
    if lowers is None:
        return zeros(length)
    size = lowers.size
    if offset + length <= size:
        return lowers.read_at(offset, length, call)
    below = max(0, size - offset)
    return (lowers.read_at(offset, below, call) if below else b"") + zeros(length - below)
