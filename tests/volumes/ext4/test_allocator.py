"""Free numbers: which are handed out, and that bitmaps and counts agree with a set."""

from __future__ import annotations

import errno
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.volumes.ext4.allocator import Allocator

PER_GROUP = 64


def allocator(total: int, used: set[int]) -> Allocator:
    """An allocator over bitmaps of 16 bytes, in which bits past a group's numbers are set."""
    groups = -(-total // PER_GROUP)
    bitmaps, free = [], []
    for group in range(groups):
        first, end = group * PER_GROUP, min((group + 1) * PER_GROUP, total)
        bits = np.array([number in used or number >= end for number in range(first, first + 128)], np.uint8)
        bits[PER_GROUP:] = 1
        bitmaps.append(np.packbits(bits, bitorder="little").tobytes())
        free.append(sum(number not in used for number in range(first, end)))
    return Allocator(total, PER_GROUP, free, bitmaps.__getitem__, "disk")


def numbers(runs: list[tuple[int, int]]) -> list[int]:
    return [number for first, length in runs for number in range(first, first + length)]


@settings(max_examples=80)
@given(st.integers(1, 300), st.integers(0, 1 << 32))
def test_against_a_set(total: int, seed: int) -> None:
    draw = random.Random(seed)
    used = {number for number in range(total) if draw.random() < draw.choice([0.1, 0.5, 0.95])}
    at_first, touched = set(used), set()
    space = allocator(total, used)
    held: list[tuple[int, int]] = []
    for _ in range(draw.randint(1, 30)):
        if held and draw.random() < 0.3:
            first, length = held.pop(draw.randrange(len(held)))
            space.give_back(first, length)
            used -= set(range(first, first + length))
        else:
            count = draw.choice([0, 1, 1, 2, 7, 80])
            if count > total - len(used):
                with pytest.raises(OSError, match="No space left") as caught:
                    space.take(count)
                assert caught.value.errno == errno.ENOSPC
                continue
            runs = space.take(count)
            found = numbers(runs)
            assert len(found) == len(set(found)) == count
            assert not used & set(found)
            assert all(0 <= number < total for number in found)
            assert all(length > 0 for _, length in runs)
            assert all(sum(run) != after[0] for run, after in itertools.pairwise(runs))
            used |= set(found)
            held += runs
            touched |= {number // PER_GROUP for number in found}
        assert space.left == total - len(used)
    written = dict(space.changed())
    assert space.free == [
        sum(number not in used for number in range(first, min(first + PER_GROUP, total)))
        for first in range(0, total, PER_GROUP)
    ]
    for group, bitmap in written.items():
        bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
        end = min(PER_GROUP, total - group * PER_GROUP)
        assert [number for number in range(end) if bits[number]] == [
            number - group * PER_GROUP for number in sorted(used) if number // PER_GROUP == group
        ]
        assert bits[end:].all()
    assert {number // PER_GROUP for number in used ^ at_first} <= set(written) <= touched


def test_numbers_come_from_behind_the_highest_in_use_then_from_the_start() -> None:
    space = allocator(200, {0, 1, 5, 100})
    assert numbers(space.take(99)) == list(range(101, 200))
    assert space.take(3) == [(2, 3)]
    assert space.take(2) == [(6, 2)]


def test_a_run_goes_over_the_border_of_groups() -> None:
    space = allocator(200, {60})
    assert space.take(100) == [(61, 100)]
    assert sorted(group for group, _ in space.changed()) == [0, 1, 2]


def test_full_groups_are_passed_over_without_their_bitmaps() -> None:
    loaded = []

    def load(group: int) -> bytes:
        loaded.append(group)
        return bytes([0] * 8 + [0xFF] * 8) if group != 3 else bytes([1] + [0] * 7 + [0xFF] * 8)

    space = Allocator(4 * PER_GROUP, PER_GROUP, [64, 0, 0, 63], load, "disk")
    assert space.take(63) == [(193, 63)]
    assert space.take_one() == 0
    assert loaded == [3, 0]


def test_numbers_given_back_are_taken_after_the_rest() -> None:
    space = allocator(130, {0})
    assert space.take(10) == [(1, 10)]
    space.give_back(3, 2)
    assert space.left == 121
    assert space.take(119) == [(11, 119)]
    assert space.take(2) == [(3, 2)]
    with pytest.raises(OSError, match="No space left"):
        space.take_one()


@pytest.mark.parametrize(("first", "length"), [(7, 1), (4, 2), (70, 1), (60, 20)])
def test_what_is_free_cannot_be_given_back(first: int, length: int) -> None:
    space = allocator(130, {4, 60, 61, 62, 63, 64})
    with pytest.raises(FormatError, match="used twice, or was free"):
        space.give_back(first, length)


def test_counts_that_the_bitmaps_contradict() -> None:
    bitmap = bytes([0b1110]) + bytes(7) + b"\xff" * 8
    with pytest.raises(FormatError, match="free count of a group is wrong"):
        Allocator(64, 64, [60], lambda group: bitmap, "disk")
    assert Allocator(64, 64, [61], lambda group: bitmap, "disk").take_one() == 4
