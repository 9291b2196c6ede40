"""The mutable map against a list with one entry per sector."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.formats.lsmt import segmentmap
from obdlab.formats.lsmt.index import SegmentIndex
from obdlab.formats.lsmt.layout import encode_segments
from obdlab.formats.lsmt.segmentmap import SegmentMap
from tests.formats.lsmt.test_index import from_runs

SECTORS = 80

changes = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "identity", "identity", "zero", "remove")),
        st.integers(0, SECTORS - 1),
        st.integers(0, 25),
        st.integers(8, 500),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(
    changes, st.booleans(), st.sampled_from((1, 2, 3, 256)), st.tuples(st.integers(0, SECTORS), st.integers(0, 99))
)
def test_model(todo: list[tuple[str, int, int, int, int]], join: bool, chunk: int, asked: tuple[int, int]) -> None:
    model: list[tuple[int, int] | None] = [None] * 200
    begin, end = asked[0], asked[0] + asked[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentmap, "_CHUNK", chunk)
        held = SegmentMap(join=join)
        for what, first, length, moffset, tag in todo:
            stop = first + length
            if what == "identity":
                moffset = first + 8
            if what == "remove":
                held.remove(first, stop)
            else:
                held.insert(first, stop, moffset, zeroed=what == "zero", tag=tag)
            for i in range(length):
                model[first + i] = {"remove": None, "zero": (~tag, 0)}.get(what, (tag, moffset + i))
            assert from_runs(held.lookup(begin, end), begin, end) == model[begin:end]
            if first % 3 == 0:  # copies in between must not make later ones stale
                assert from_runs(SegmentIndex(held.to_segments()).lookup(0, 200), 0, 200) == model
    index = SegmentIndex(held.to_segments())
    assert from_runs(index.lookup(0, 200), 0, 200) == model
    assert len(index) == len(held)


def test_unjoined_segments_stay_as_written() -> None:
    held = SegmentMap()
    for i in range(4):
        held.insert(i, i + 1, 8 + i)
    assert len(held) == 4


def test_joined_segments_grow_both_ways() -> None:
    held = SegmentMap(join=True)
    for begin, end, count in ((0, 4, 1), (8, 12, 2), (4, 8, 1), (12, 13, 1), (20, 22, 2), (18, 20, 2), (2, 9, 2)):
        held.insert(begin, end, begin + 8)
        assert len(held) == count
    assert held.lookup(0, 13) == [(0, 13, 0, 8)]
    held.insert(13, 18, 500)  # goes on on the disk, not in the file
    assert len(held) == 3


def test_zeroed_segment_keeps_its_mapped_offset_when_cut() -> None:
    held = SegmentMap()
    held.insert(0, 10, 77, zeroed=True)
    held.insert(4, 6, 9)
    assert held.to_segments().rows() == [(0, 4, 77, True, 0), (4, 2, 9, False, 0), (6, 4, 77, True, 0)]


def test_long_segments_are_cut_for_records() -> None:
    held = SegmentMap(join=True)
    held.insert(0, 40000, 8)
    assert held.to_segments().rows() == [
        (0, 16383, 8, False, 0),
        (16383, 16383, 16391, False, 0),
        (32766, 7234, 32774, False, 0),
    ]


def test_bad_ranges_are_refused() -> None:
    held = SegmentMap()
    for begin, end in ((-1, 3), (3, 2)):
        with pytest.raises(ValueError, match="no range"):
            held.insert(begin, end, 8)
    held.insert(3, 3, 8)
    assert len(held) == 0


def test_records_prepared_ahead_are_those_of_the_map_as_it_is() -> None:
    held, rng = SegmentMap(), random.Random(1)
    for number in range(3000):
        begin = rng.randrange(1 << 20)
        held.insert(begin, begin + rng.choice((1, 8, 40_000)), 8 + number, zeroed=number % 5 == 0)
        if number % 500 == 0:
            held.freeze(0, len(held))
    assert held.to_records() == encode_segments(held.to_segments())
    assert SegmentMap().to_records() == b""
