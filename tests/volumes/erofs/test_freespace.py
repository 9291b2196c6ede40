"""Blocks of an EROFS that grows: where things go, and that reads see what is not written yet."""

from __future__ import annotations

import errno
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.volumes.erofs import freespace
from obdlab.volumes.erofs.freespace import Space
from obdlab.volumes.erofs.pack import BLOCK, SLOT
from tests.volumes.erofs.samples import CountingDisk
from tests.volumes.ext4.samples import MemoryDisk


@settings(max_examples=60)
@given(st.integers(0, 1 << 32), st.sampled_from([2, 4096]))
def test_reads_see_what_is_not_written_yet(seed: int, held: int) -> None:
    # Against a flat copy: metadata changed in memory, data gathered, flushed at any time.
    draw = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freespace, "_MOST_CHANGED", held)
        disk = MemoryDisk(96 * BLOCK)
        space, model = Space(disk, 2), bytearray(96 * BLOCK)
        first = space.data_blocks(12)
        space.data_blocks(24)  # those that are changed
        at = first * BLOCK
        for _ in range(draw.randint(1, 40)):
            what = draw.choice(["change", "place", "data", "read", "read", "flush", "discard"])
            data = draw.randbytes(draw.choice([1, 32, 100, BLOCK, BLOCK + 1, 3 * BLOCK]))
            if what == "change":
                offset = draw.randrange(20 * BLOCK, 34 * BLOCK)
                space.change(offset, data)
                model[offset : offset + len(data)] = data
            elif what == "place" and len(data) <= BLOCK:
                offset = space.place(len(data))
                space.change(offset, data)
                model[offset : offset + len(data)] = data
            elif what == "data" and at + len(data) <= (first + 12) * BLOCK:
                space.write(at, data)
                model[at : at + len(data)] = data
                at += draw.choice([len(data), len(data), len(data) + BLOCK])
            elif what == "flush":
                space.flush()
                assert disk.data == model
            elif what == "discard":
                block = draw.randrange(first, first + 12)
                space.discard(block, 1)
                model[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
            offset, length = draw.randrange(92 * BLOCK), draw.choice([0, 1, 100, BLOCK, 4 * BLOCK])
            assert space.read_at(offset, length) == model[offset : offset + length]
        space.flush()
        assert disk.data == model


@given(st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=80))
def test_places_are_apart_and_in_one_block_if_they_can_be(sizes: list[int]) -> None:
    space = Space(MemoryDisk(8 << 20), 5)
    taken: list[tuple[int, int]] = []
    for size in sizes:
        at = space.place(size)
        assert at % SLOT == 0
        assert at >= 5 * BLOCK
        assert at + size <= space.end * BLOCK
        if size <= BLOCK:
            assert at // BLOCK == (at + size - 1) // BLOCK
        else:
            assert at % BLOCK == 0
        taken.append((at, at + size))
    taken.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(taken))


def test_small_places_share_a_block() -> None:
    space = Space(MemoryDisk(1 << 20), 0)
    places = [space.place(64) for _ in range(BLOCK // 64)]
    assert places == list(range(0, BLOCK, 64))
    assert space.place(64) == BLOCK


def test_the_tightest_open_block_is_filled_first() -> None:
    space = Space(MemoryDisk(1 << 20), 0)
    large, small = space.place(BLOCK - 1024), space.place(BLOCK - 128)
    assert space.place(128) == small + BLOCK - 128
    assert space.place(512) == large + BLOCK - 1024
    # What a place leaves counts in whole slots.
    assert space.place(512 - SLOT + 1) == large + BLOCK - 512
    assert space.place(SLOT) // BLOCK not in (large // BLOCK, small // BLOCK)


def test_metadata_lies_in_runs_that_grow() -> None:
    space = Space(MemoryDisk(8 << 20), 10)
    ends = []
    for _ in range(1024):
        space.metadata_blocks(1)
        if space.end not in ends:
            ends.append(space.end)
    runs = [end - begin for begin, end in zip([10, *ends], ends, strict=False)]
    assert runs == [8, 16, 32, 64, 128, 256, 256, 256, 256]


def test_places_are_held_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freespace, "_MOST_CHANGED", 4)
    disk = MemoryDisk(4 << 20)
    space, model = Space(disk, 0), bytearray(4 << 20)
    for number in range(1000):
        at, data = space.place(2000), number.to_bytes(4, "little") * 500
        space.change(at, data)
        model[at : at + len(data)] = data
        assert len(space._changed) <= 4 + freespace._OPEN
    space.flush()
    assert disk.data == model


def test_data_and_metadata_do_not_meet() -> None:
    space = Space(MemoryDisk(8 << 20), 10)
    blocks: list[int] = []
    for count in (1, 3, 9, 2, 30, 1):
        for first in (space.metadata_blocks(count), space.data_blocks(count)):
            blocks += range(first, first + count)
    assert len(set(blocks)) == len(blocks)
    assert min(blocks) == 10
    assert max(blocks) < space.end


def test_the_last_block_can_be_taken_and_no_more() -> None:
    space = Space(MemoryDisk(10 * BLOCK + 4000), 2)
    assert space.data_blocks(7) == 2
    with pytest.raises(OSError, match="No space left") as caught:
        space.data_blocks(2)
    assert caught.value.errno == errno.ENOSPC
    assert space.data_blocks(1) == 9
    assert space.end == 10
    with pytest.raises(OSError, match="No space left"):
        space.data_blocks(1)


def test_what_is_adjacent_is_written_together() -> None:
    disk = CountingDisk(1 << 22)
    space = Space(disk, 0)
    for at in range(0, 10 * BLOCK, 100):
        space.write(at, b"d" * 100)
    assert disk.writes == []
    space.write(20 * BLOCK, b"elsewhere")
    assert disk.writes == [(0, -(-10 * BLOCK // 100) * 100)]
    for block in (101, 100, 102, 104):
        space.change(block * BLOCK, b"m")
    space.flush()
    assert disk.writes[1:] == [(20 * BLOCK, 9), (100 * BLOCK, 3 * BLOCK), (104 * BLOCK, BLOCK)]
    before = len(disk.writes)
    space.flush()
    assert len(disk.writes) == before


def test_only_blocks_that_were_written_are_discarded() -> None:
    disk = CountingDisk(1 << 20)
    space = Space(disk, 0)
    space.write(3 * BLOCK, b"x" * BLOCK)
    space.discard(3, 0)
    assert disk.discards == disk.writes == []
    space.discard(3, 1)
    space.flush()
    assert disk.discards == [(3 * BLOCK, BLOCK)]
    assert disk.data == bytes(1 << 20)
