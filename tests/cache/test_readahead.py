"""Which units are fetched ahead, by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from obdlab.cache.readahead import ReadAhead


def test_window_is_half_the_way_the_reader_has_come() -> None:
    readahead = ReadAhead(units=1000, max_window=16, max_piece=4)
    assert [readahead.missed(unit, unit + 1) for unit in (10, 11, 12)] == [[], [], []]  # who knows
    assert readahead.missed(13, 14) == [(14, 16)]
    assert readahead.is_mark(14)
    assert not readahead.is_mark(15)
    assert readahead.passed(14) == []  # not a whole piece
    assert not readahead.is_mark(14)
    assert readahead.missed(16, 17) == [(17, 19)]
    assert readahead.passed(17) == [(19, 21)]
    assert readahead.passed(19) == [(21, 23), (23, 25)]


def follow(readahead: ReadAhead, stop: int) -> list[tuple[int, int]]:
    """Read unit after unit, and return all that is fetched, by the reader and ahead of him."""
    fetched: list[tuple[int, int]] = []
    for unit in range(stop):
        if not any(first <= unit < end for first, end in fetched):
            fetched.append((unit, unit + 1))
            fetched += readahead.missed(unit, unit + 1)
        elif readahead.is_mark(unit):
            fetched += readahead.passed(unit)
    return fetched


def test_long_readers_get_whole_pieces() -> None:
    readahead = ReadAhead(units=1000, max_window=16, max_piece=4)
    fetched = follow(readahead, 500)
    assert [first for first, _ in fetched] == [0, *[end for _, end in fetched[:-1]]]  # all of it, once
    assert {end - first for first, end in fetched[30:]} == {4}


def test_the_end_of_the_blob_is_fetched_too() -> None:
    readahead = ReadAhead(units=101, max_window=16, max_piece=4)
    assert follow(readahead, 101)[-1][1] == 101


def test_a_reader_that_skips_a_little_is_sequential() -> None:
    readahead = ReadAhead(units=1000, max_window=16, max_piece=4)
    readahead.missed(10, 14)
    assert readahead.missed(15, 16) == [(16, 18)]
    assert readahead.missed(20, 21) == []


def test_random_and_backward_readers_get_nothing() -> None:
    readahead = ReadAhead(units=1000, max_window=16, max_piece=4)
    for unit in [500, 3, 800, 200, 199, 198, 197]:
        assert readahead.missed(unit, unit + 1) == []


def test_window_of_nothing() -> None:
    readahead = ReadAhead(units=1000, max_window=0, max_piece=4)
    assert [readahead.missed(unit, unit + 1) for unit in range(5)] == [[]] * 5


@given(
    st.integers(1, 60),
    st.integers(0, 20),
    st.integers(0, 6),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 10)), max_size=60),
)
def test_what_it_returns_is_inside_and_bounded(
    units: int, window: int, piece: int, asked: list[tuple[int, int]]
) -> None:
    readahead = ReadAhead(units, window, piece)
    for first, length in asked:
        first = min(first, units - 1)
        stop = min(first + length, units)
        pieces = readahead.passed(first) if readahead.is_mark(first) else readahead.missed(first, stop)
        assert all(0 <= begin < end <= units and end - begin <= max(piece, 1) for begin, end in pieces)
        assert sum(end - begin for begin, end in pieces) <= window
        assert all(end <= stop + window + 1 for _, end in pieces)
