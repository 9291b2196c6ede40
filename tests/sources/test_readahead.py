"""Which units are fetched ahead, by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from obdlab.sources.readahead import ReadAhead


def test_window_doubles_and_several_pieces_are_under_way() -> None:
    readahead = ReadAhead(units=1000, max_window=16, max_piece=4)
    assert readahead.missed(10, 11) == []  # who knows
    assert readahead.missed(11, 12) == [(12, 14)]
    assert readahead.is_mark(12)
    assert readahead.passed(12) == [(14, 17)]
    assert readahead.passed(14) == [(17, 21), (21, 23)]
    assert readahead.passed(17) == [(23, 27), (27, 31), (31, 34)]
    assert readahead.passed(21) == [(34, 38)]  # the window has its full width now and just moves on


def test_a_reader_that_skips_a_little_is_sequential() -> None:
    readahead = ReadAhead(units=1000, max_window=16, max_piece=4)
    readahead.missed(10, 12)
    assert readahead.missed(14, 15) == [(15, 17)]


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
