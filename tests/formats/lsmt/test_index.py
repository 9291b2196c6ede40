"""Lookup, merge, split and coalesce against slow twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.formats.lsmt.index import HOLE, LayeredIndex, Run, SegmentIndex, add_on_top, coalesce, merge, split
from obdlab.formats.lsmt.layout import Segments
from tests.formats.lsmt.oracle import Row, coalesce_rows, merge_rows


def layers(max_layers: int = 6, max_segments: int = 12, tags: int = 0) -> st.SearchStrategy[list[list[Row]]]:
    """Stacks of layers, each of ascending segments with or without gaps."""
    piece = st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(8, 40), st.booleans(), st.integers(0, tags))
    return st.lists(st.lists(piece, max_size=max_segments).map(_laid_out), min_size=1, max_size=max_layers)


def _laid_out(pieces: list[tuple[int, int, int, bool, int]]) -> list[Row]:
    rows: list[Row] = []
    at = 0
    for gap, length, moffset, zeroed, tag in pieces:
        rows.append((at + gap, length, moffset, zeroed, tag))
        at += gap + length
    return rows


def sectors(rows: list[Row], begin: int, end: int) -> list[tuple[int, int] | None]:
    """What each sector is: None, or (source, mapped sector)."""
    out: list[tuple[int, int] | None] = [None] * (end - begin)
    for offset, length, moffset, zeroed, tag in rows:
        for i in range(length):
            if begin <= offset + i < end:
                out[offset + i - begin] = (~tag, 0) if zeroed else (tag, moffset + i)
    return out


def from_runs(runs: list[Run], begin: int, end: int) -> list[tuple[int, int] | None]:
    """The same from a lookup's runs, which must cover the range in order."""
    out: list[tuple[int, int] | None] = []
    for offset, length, source, moffset in runs:
        assert offset == begin + len(out)
        assert length > 0
        out += [None if source == HOLE else (source, moffset + i if source >= 0 else 0) for i in range(length)]
    assert len(out) == end - begin
    return out


@given(layers(max_layers=1, max_segments=30, tags=255), st.integers(0, 200), st.integers(0, 60))
def test_lookup(stack: list[list[Row]], begin: int, length: int) -> None:
    index = SegmentIndex(Segments.from_rows(stack[0]))
    end = begin + length
    assert from_runs(index.lookup(begin, end), begin, end) == sectors(stack[0], begin, end)


@given(layers(max_layers=1, max_segments=5), st.integers(0, 49))
def test_lookup_of_far_and_sparse_segments(stack: list[list[Row]], shift: int) -> None:
    # The bucket table must stay small and right whatever the distances are.
    rows = [(offset << shift, length, moffset, zeroed, tag) for offset, length, moffset, zeroed, tag in stack[0]]
    rows = [row for i, row in enumerate(rows) if not i or row[0] >= rows[i - 1][0] + rows[i - 1][1]]
    rows = [row for row in rows if row[0] + row[1] < 2**50]
    index = SegmentIndex(Segments.from_rows(rows))
    assert len(index._bucket) <= 2 * len(rows) + 3
    for offset, length, *_ in rows:
        for begin in (max(0, offset - 1), offset, offset + length - 1, offset + length):
            assert from_runs(index.lookup(begin, begin + 3), begin, begin + 3) == sectors(rows, begin, begin + 3)


@given(
    layers(max_layers=1, max_segments=30, tags=255),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=30),
    st.sampled_from((0, 0, 30)),
)
def test_batched_lookup(stack: list[list[Row]], asked: list[tuple[int, int]], shift: int) -> None:
    rows = [(offset << shift, length, moffset, zeroed, tag) for offset, length, moffset, zeroed, tag in stack[0]]
    if shift:
        rows = [row for i, row in enumerate(rows) if not i or row[0] >= rows[i - 1][0] + rows[i - 1][1]]
    index = SegmentIndex(Segments.from_rows(rows))
    begin = np.array([begin << shift for begin, _ in asked], dtype=np.int64)
    end = begin + np.array([length for _, length in asked], dtype=np.int64)
    count, runs = index.lookup_batch(begin, end)
    found = list(
        zip(
            runs.offset_sectors.tolist(),
            runs.length_sectors.tolist(),
            runs.source.tolist(),
            runs.moffset_sectors.tolist(),
            strict=True,
        )
    )
    for first, last, number in zip(begin.tolist(), end.tolist(), count.tolist(), strict=True):
        # What a zeroed run maps to means nothing.
        wanted = [run[:3] for run in index.lookup(first, last) if run[2] != HOLE]
        assert [run[:3] for run in found[:number]] == wanted
        assert [run for run in found[:number] if run[2] >= 0] == [r for r in index.lookup(first, last) if r[2] >= 0]
        del found[:number]
    assert found == []


@given(layers(max_layers=5))
def test_one_more_layer_on_top(stack: list[list[Row]]) -> None:
    indexes = [SegmentIndex(Segments.from_rows(rows)) for rows in stack]
    merged = merge(indexes[:1])
    for i in range(1, len(indexes)):
        merged = add_on_top(merged, indexes[i])
    assert merged.segments().rows() == merge_rows(stack)


@given(layers(max_layers=3), st.integers(0, 200), st.integers(0, 60))
def test_one_more_layer_on_top_without_merging(stack: list[list[Row]], begin: int, length: int) -> None:
    indexes = [SegmentIndex(Segments.from_rows(rows)).segments().without_tags() for rows in stack]
    below = merge([SegmentIndex(segments) for segments in indexes[:-1]]) if len(indexes) > 1 else None
    both = LayeredIndex(below, SegmentIndex(indexes[-1]).lookup)
    wanted = sectors(merge_rows(stack), begin, begin + length)
    assert from_runs(both.lookup(begin, begin + length), begin, begin + length) == wanted


@pytest.mark.parametrize(
    "rows", [[(0, 4), (3, 4)], [(0, 4), (10, 10), (15, 1)], [(10, 4), (0, 4)], [(0, 9), (20, 5), (9, 3)]]
)
def test_index_refuses_what_is_not_sorted(rows: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="overlap"):
        SegmentIndex(Segments.from_rows([(offset, length, 8, False, 0) for offset, length in rows]))


@given(layers(max_layers=1), st.integers(0, 60), st.integers(1, 12))
def test_find_names_the_segment_that_holds_all(stack: list[list[Row]], begin: int, length: int) -> None:
    index = SegmentIndex(Segments.from_rows(stack[0]))
    holders = [i for i, row in enumerate(stack[0]) if row[0] <= begin and begin + length <= row[0] + row[1]]
    assert index.find(begin, begin + length) == (holders[0] if holders else -1)


@given(layers(max_layers=1, tags=255))
def test_segments_come_back(stack: list[list[Row]]) -> None:
    index = SegmentIndex(Segments.from_rows(stack[0]))
    assert index.segments().rows() == stack[0]
    assert len(index) == len(stack[0])
    assert index.end_sectors == (stack[0][-1][0] + stack[0][-1][1] if stack[0] else 0)


@settings(max_examples=300)
@given(layers(max_layers=9))
def test_merge(stack: list[list[Row]]) -> None:
    merged = merge([SegmentIndex(Segments.from_rows(rows)) for rows in stack]).segments().rows()
    assert merged == merge_rows(stack)
    # And the oracle against painting sectors one by one.
    painted: list[tuple[int, int] | None] = [None] * 200
    for depth, rows in enumerate(stack):
        numbered = [(*row[:4], len(stack) - 1 - depth) for row in rows]
        painted = [new or old for old, new in zip(painted, sectors(numbered, 0, 200), strict=True)]
    assert sectors(merged, 0, 200) == painted


def test_merge_numbers_layers_from_the_top() -> None:
    bottom = SegmentIndex(Segments.from_rows([(0, 10, 8, False, 0)]))
    top = SegmentIndex(Segments.from_rows([(2, 2, 8, False, 0), (6, 2, 10, True, 0)]))
    assert merge([bottom, top]).segments().rows() == [
        (0, 2, 8, False, 1),
        (2, 2, 8, False, 0),
        (4, 2, 12, False, 1),
        (6, 2, 10, True, 0),
        (8, 2, 16, False, 1),
    ]


def test_merge_of_255_layers_and_no_more() -> None:
    one = [SegmentIndex(Segments.from_rows([(i, 300 - i, 8, False, 0)])) for i in range(255)]
    merged = merge(one).segments()
    assert merged.tag.tolist() == list(range(254, -1, -1))
    assert merged.offset_sectors.tolist() == list(range(255))
    for wrong in ([], [one[0]] * 256):
        with pytest.raises(ValueError, match="1 to 255 layers"):
            merge(wrong)


@given(layers(max_layers=1, max_segments=40, tags=1))
def test_coalesce_small(stack: list[list[Row]]) -> None:
    _check_coalesce(stack[0])


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from((0, 0, 0, 0, 1)), st.sampled_from((1, 64, 63, 8000, 16382, 16383)), st.booleans()),
        max_size=60,
    )
)
def test_coalesce_near_the_limit(pieces: list[tuple[int, int, bool]]) -> None:
    rows: list[Row] = []
    offset, moffset = 0, 8
    zeroed = False
    for gap, length, flip in pieces:
        zeroed ^= flip and gap == 1
        rows.append((offset + gap, length, moffset, zeroed, 0))
        offset += gap + length
        moffset += 0 if zeroed else length
    _check_coalesce(rows)


def _check_coalesce(rows: list[Row]) -> None:
    assert coalesce(Segments.from_rows(rows)).rows() == coalesce_rows(rows)


def test_longest_joined_segment_is_16382() -> None:
    rows: list[Row] = [(i, 1, 8 + i, False, 0) for i in range(40000)]
    assert coalesce(Segments.from_rows(rows)).length_sectors.tolist() == [16382, 16382, 7236]
    chunks: list[Row] = [(64 * i, 64, 8 + 64 * i, False, 0) for i in range(600)]
    assert coalesce(Segments.from_rows(chunks)).length_sectors.tolist() == [16320, 16320, 5760]


@given(layers(max_layers=1, tags=3), st.integers(1, 10), st.booleans())
def test_split(stack: list[list[Row]], limit: int, split_zeroed: bool) -> None:
    pieces = split(Segments.from_rows(stack[0]), limit, split_zeroed=split_zeroed).rows()
    expected: list[Row] = []
    for offset, length, moffset, zeroed, tag in stack[0]:
        step = limit if split_zeroed or not zeroed else length
        expected += [
            (offset + i, min(step, length - i), moffset if zeroed else moffset + i, zeroed, tag)
            for i in range(0, length, step)
        ]
    assert pieces == expected
