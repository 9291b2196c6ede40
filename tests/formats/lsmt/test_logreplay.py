"""Replaying a log against a list with one entry per sector, and the bulk conversions of the mutable map."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.formats.lsmt.layout import Segments
from obdlab.formats.lsmt.logreplay import replay
from obdlab.formats.lsmt.segmentmap import SegmentMap
from tests.formats.lsmt.oracle import Row

records = st.lists(
    st.tuples(st.integers(0, 90), st.integers(1, 25), st.integers(8, 500), st.booleans(), st.just(0)), max_size=60
)


def painted(log: list[Row]) -> list[Row]:
    """Every sector's last writer; neighbours of one writer joined."""
    owner: list[int | None] = [None] * 200
    for number, (offset, length, *_) in enumerate(log):
        for sector in range(offset, offset + length):
            owner[sector] = number
    out: list[Row] = []
    last = None
    for sector, number in enumerate(owner):
        if number is None:
            last = None
        elif number == last:
            offset, length, moffset, zeroed, tag = out[-1]
            out[-1] = (offset, length + 1, moffset, zeroed, tag)
        else:
            offset, _, moffset, zeroed, tag = log[number]
            out.append((sector, 1, moffset if zeroed else moffset + sector - offset, zeroed, tag))
            last = number
    return out


@settings(max_examples=300, deadline=None)
@given(records)
def test_last_record_wins(log: list[Row]) -> None:
    left = replay(Segments.from_rows(log))
    assert left.rows() == painted(log)
    assert SegmentMap.of(left).to_segments().rows() == left.rows()


@settings(max_examples=100, deadline=None)
@given(records)
def test_the_same_as_inserting_one_by_one(log: list[Row]) -> None:
    held = SegmentMap()
    for offset, length, moffset, zeroed, _ in log:
        held.insert(offset, offset + length, moffset, zeroed=zeroed)
    assert replay(Segments.from_rows(log)).rows() == held.to_segments().rows()


def test_a_map_made_at_once_goes_on_like_any_other() -> None:
    rows = [(i * 4, 3, 8 + i * 3, i % 5 == 0, 0) for i in range(2000)]
    at_once = SegmentMap.of(Segments.from_rows(rows))
    one_by_one = SegmentMap()
    for offset, length, moffset, zeroed, _ in rows:
        one_by_one.insert(offset, offset + length, moffset, zeroed=zeroed)
    for held in (at_once, one_by_one):
        held.insert(1001, 5002, 20000)
        held.remove(0, 2)
        held.insert(7999, 8003, 9)
    assert at_once.to_segments().rows() == one_by_one.to_segments().rows()
    assert len(SegmentMap.of(Segments.from_rows([]))) == 0
