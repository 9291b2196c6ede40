"""Stacks: what they read, how often they read, and what a writable one over a sparse layer takes care of."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.errors import FormatError, OutOfRangeError
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.stack import Stack, WritableStack, zeros
from obdlab.layers.upper import SparseUpper
from tests.layers.lsmt_samples import Extent, Watched, layer, sealed_bytes

if TYPE_CHECKING:
    from obdlab.call import Call
    from obdlab.layers.stack import ReadAt

DISK_SECTORS = 61  # ends inside a 4 KiB block
DISK = DISK_SECTORS * 512


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    out: list[Extent] = []
    at = 0
    for gap, length, zeroed in draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12), st.booleans()))):
        if at + gap + length > DISK_SECTORS:
            break
        out.append((at + gap, length, zeroed))
        at += gap + length
    return out


def disk_of(layers: list[LsmtLayer], size: int = DISK) -> bytearray:
    """What a stack holds, sector by sector."""
    disk = bytearray(size)
    for each in layers:
        for offset, length, moffset, zeroed, _ in each.index.segments().rows():
            data = bytes(length * 512) if zeroed else each.data.read_at(moffset * 512, length * 512)
            disk[offset * 512 : (offset + length) * 512] = data
    return disk[:size]


@settings(deadline=None)
@given(st.lists(extents(), min_size=1, max_size=5), st.integers(0, DISK), st.integers(0, DISK))
def test_any_range_of_any_stack(parts: list[list[Extent]], begin: int, end: int) -> None:
    begin, end = sorted((begin, end))
    layers = [layer(part, DISK, seed) for seed, part in enumerate(parts)]
    stack = Stack(layers)
    disk = disk_of(layers)
    assert stack.read_at(0, DISK) == disk
    assert stack.read_at(begin, end - begin) == disk[begin:end]


def test_size_is_the_topmost_that_is_not_zero() -> None:
    sizes = [[8192, 0, 0], [8192, 16384, 0], [0, 0, 0], [8192, 0, 4096]]
    assert [Stack([layer([], size) for size in each]).size for each in sizes] == [8192, 16384, 0, 4096]


def test_a_smaller_top_layer_cuts_the_disk() -> None:
    stack = Stack([layer([(0, 16, False)], 8192), layer([], 4096)])
    assert len(stack.read_at(0, 4096)) == 4096
    with pytest.raises(OutOfRangeError):
        stack.read_at(0, 4097)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, DISK + 1), (DISK + 1, 0), (2**70, 1)])
def test_ranges_outside_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    stack = Stack([layer([(0, 8, False)], DISK, name="l")])
    writable = WritableStack(None, SparseUpper.create(tmp_path / "u", DISK))
    for blob in (stack, writable):
        with pytest.raises(OutOfRangeError):
            blob.read_at(offset, length)
        with pytest.raises(OutOfRangeError):
            blob.evict(offset, length)
    with pytest.raises(OutOfRangeError):
        writable.discard(offset, length)
    if length > 0 and offset < DISK + 2:
        with pytest.raises(OutOfRangeError):
            writable.write_at(offset, bytes(length))
    writable.close()


def test_a_stack_has_the_name_of_its_only_layer_or_of_its_topmost() -> None:
    one, two = layer([], DISK, name="one"), layer([], DISK, name="two")
    assert Stack([one]).name == "one"
    assert Stack([one, two]).name == "stack of 2 layers up to two"


def test_at_most_255_layers() -> None:
    one = layer([(0, 1, False)], DISK)
    assert Stack([one] * 255).read_at(0, 512) == one.data.read_at(4096, 512)
    for wrong in ([], [one] * 256):
        with pytest.raises(FormatError, match="wanted 1 to 255"):
            Stack(wrong)


def test_runs_that_continue_each_other_are_one_read() -> None:
    # Packed data: 4 sectors, a hole, 4 sectors, zeros, 4 sectors; with a piece of another layer before the last.
    watched = Watched(layer([(0, 4, False), (6, 4, False), (10, 2, True), (12, 8, False)], DISK, 1).data)
    top = Watched(layer([(14, 1, False)], DISK, 2).data)
    stack = Stack([LsmtLayer(watched), LsmtLayer(top)])
    disk = disk_of([LsmtLayer(watched.blob), LsmtLayer(top.blob)])
    watched.reads.clear()
    top.reads.clear()
    assert stack.read_at(100, 20 * 512 - 100) == disk[100 : 20 * 512]
    assert watched.reads == [(4196, 10 * 512 - 100), (4096 + 11 * 512, 5 * 512)]
    assert top.reads == [(4096, 512)]


def test_a_buffer_is_filled_by_the_layer_unless_the_stack_is_watched() -> None:
    seen = []
    stack = Stack([layer([(0, 8, False)], DISK)])

    def around(number: int, read: ReadAt) -> ReadAt:
        def watched(offset: int, length: int, call: Call | None) -> bytes:
            seen.append((number, offset, length))
            return read(offset, length, call)

        return watched

    filled = []
    for watch in (None, around, None):
        stack.watch(watch)
        out = bytearray(1024)
        stack.read_into(512, memoryview(out))
        filled.append(bytes(out))
    assert filled == [stack.read_at(512, 1024)] * 3
    assert seen == [(0, 4096 + 512, 1024)]


def test_a_single_run_is_handed_on_uncopied() -> None:
    stack = Stack([layer([(0, 8, False)], DISK)])
    content = bytes(4096)
    stack._reads = (lambda _offset, _length, _call: content,)
    assert stack.read_at(0, 4096) is content


def test_zeros_are_shared() -> None:
    stack = Stack([layer([(0, 8, True)], DISK)])
    assert stack.read_at(0, 4096) is stack.read_at(8192, 4096) is zeros(4096)
    assert zeros(5) == bytes(5)
    assert zeros(0) == b""
    big = Stack([layer([(0, 1, False)], 4 << 20)])
    assert big.read_at(0, 4 << 20).count(0) > (4 << 20) - 512


def test_evict_and_close_are_passed_down() -> None:
    bottom = Watched(layer([(0, 8, False)], DISK).data)
    top = Watched(layer([(4, 1, False), (20, 2, True)], DISK).data)
    stack = Stack([LsmtLayer(bottom), LsmtLayer(top)])
    stack.evict(3 * 512 + 1, 512 * 20)
    assert bottom.evicted == [(4096 + 3 * 512, 512), (4096 + 5 * 512, 3 * 512)]
    assert top.evicted == [(4096, 512)]
    stack.close()
    assert bottom.closed
    assert top.closed


def test_an_upper_of_no_size_takes_the_lowers(tmp_path: Path) -> None:
    path = tmp_path / "upper"
    with WritableStack(Stack([layer([(0, 8, False)], DISK)]), SparseUpper.create(path, 0)) as stack:
        assert stack.size == DISK
    assert path.stat().st_size == 4096 + DISK
    with SparseUpper.open(path) as upper:
        assert upper.virtual_size == DISK


def test_an_upper_larger_than_its_lowers(tmp_path: Path) -> None:
    lower = layer([(0, 61, False)], DISK, 3)
    with WritableStack(Stack([lower]), SparseUpper.create(tmp_path / "upper", 2 * DISK)) as stack:
        assert stack.read_at(0, 2 * DISK) == disk_of([lower]) + bytes(DISK)
        stack.write_at(DISK - 1, b"ab")
        assert stack.read_at(DISK - 2, 4) == disk_of([lower])[-2:-1] + b"ab\0"
        stack.discard(0, 2 * DISK)
        stack.evict(0, 2 * DISK)
        assert not any(stack.read_at(0, 2 * DISK))


def test_data_beyond_the_end_of_the_layer_above_does_not_come_back(tmp_path: Path) -> None:
    end = 30 * 512
    lowers = Stack([layer([(0, DISK_SECTORS, False)], DISK, 3), layer([], end, 4)])
    upper, fresh = SparseUpper.create(tmp_path / "upper", DISK), SparseUpper.create(tmp_path / "fresh", 0)
    with fresh, WritableStack(lowers, upper) as stack:
        assert not any(stack.read_at(end, DISK - end))
        for larger in (stack.as_layers, partial(stack.restack, fresh)):
            with pytest.raises(FormatError, match="lowers have data beyond their end"):
                larger()
        stack.write_at(0, b"x" * 512)
        assert not any(stack.read_at(end, DISK - end))


def test_partial_write_over_lower_data_survives_a_reopening(tmp_path: Path) -> None:
    # The original loses the seven other sectors here.
    lower = layer([(0, 16, False)], DISK, 4)
    wanted = disk_of([lower])
    wanted[1024:1536] = b"n" * 512
    path = tmp_path / "upper"
    with WritableStack(Stack([lower]), SparseUpper.create(path, DISK)) as stack:
        stack.write_at(1024, b"n" * 512)
        stack.flush()
    with WritableStack(Stack([lower]), SparseUpper.open(path)) as stack:
        assert stack.read_at(0, DISK) == wanted


def test_discard_over_lower_data_survives_a_reopening(tmp_path: Path) -> None:
    # The original shows the lower layer's data again here.
    lower = layer([(0, 16, False)], DISK, 4)
    path = tmp_path / "upper"
    with WritableStack(Stack([lower]), SparseUpper.create(path, DISK)) as stack:
        stack.write_at(32 * 512, b"x" * 4096)
        stack.discard(4096, DISK - 4096)
        held = stack.upper.index.segments().rows()
    assert [(offset, length) for offset, length, *_ in held] == [(8, 8)]  # zeros over the lower, a hole elsewhere
    with WritableStack(Stack([lower]), SparseUpper.open(path)) as stack:
        assert stack.read_at(0, DISK) == disk_of([lower])[:4096] + bytes(DISK - 4096)


def test_whole_blocks_are_not_read_before_they_are_written(tmp_path: Path) -> None:
    watched = Watched(layer([(0, 48, False), (56, 5, False)], DISK).data)
    with WritableStack(Stack([LsmtLayer(watched)]), SparseUpper.create(tmp_path / "upper", DISK)) as stack:
        watched.reads.clear()
        stack.write_at(4096, bytes(8192))
        stack.write_at(4096 + 512, bytes(512))  # inside a block the upper holds
        stack.write_at(50 * 512, bytes(512))  # no lower data in this block, though in the next
        assert watched.reads == []
        held = [(begin, count) for begin, count, source, _ in stack.upper.lookup(48, 56) if source >= 0]
        assert held == [(50, 1)]
        stack.write_at(512, bytes(512))
        assert len(watched.reads) == 2


def test_writers_of_one_block_do_not_undo_each_other(tmp_path: Path) -> None:
    lower = layer([(0, 61, False)], DISK, 5)
    with WritableStack(Stack([lower]), SparseUpper.create(tmp_path / "upper", DISK)) as stack:

        def write(first: int) -> None:
            for sector in range(first, DISK_SECTORS, 4):
                stack.write_at(sector * 512, bytes([sector]) * 512)

        threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert stack.read_at(0, DISK) == b"".join(bytes([sector]) * 512 for sector in range(DISK_SECTORS))


def test_sealed_sample_is_refused_if_inconsistent() -> None:
    with pytest.raises(FormatError):
        LsmtLayer(MemoryBlob(sealed_bytes([(0, 2, 8, False, 0)], bytes(512), DISK)))
