"""Merging, comparing and cutting down traces, against sets of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from obdlab.formats.trace import Trace
from obdlab.traces.sets import coverage, difference, frame, from_frame, merge, select, summary, unique
from tests import capabilities

READS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 9)), max_size=12)
Bytes = set[tuple[int, int]]


def bytes_of(trace: Trace) -> Bytes:
    return {(layer, at) for layer, offset, length in trace.reads() for at in range(offset, offset + length)}


def first_use(trace: Trace) -> list[tuple[int, int]]:
    each = ((layer, at) for layer, offset, length in trace.reads() for at in range(offset, offset + length))
    return list(dict.fromkeys(each))


@given(READS)
def test_unique_keeps_all_bytes_in_the_order_of_first_use(reads: list[tuple[int, int, int]]) -> None:
    trace = Trace.from_reads(reads)
    once = unique(trace)
    assert first_use(once) == first_use(trace)
    assert once.size == len(bytes_of(trace)) == summary(trace)["unique_size"]
    held = {
        (layer, at) for layer, ranges in coverage(trace).items() for begin, end in ranges for at in range(begin, end)
    }
    assert held == bytes_of(trace)


@given(st.lists(READS, min_size=1, max_size=4), st.data())
def test_merge_by_how_many_read_it(runs: list[list[tuple[int, int, int]]], data: st.DataObject) -> None:
    traces = [Trace.from_reads(reads) for reads in runs]
    least = data.draw(st.integers(1, len(traces)))
    merged = merge(traces, least=least)
    held = [bytes_of(trace) for trace in traces]
    wanted = {each for each in set().union(*held) if sum(each in one for one in held) >= least}
    assert bytes_of(merged) == wanted
    assert merged.size == len(wanted)


@given(READS, READS)
def test_difference(one: list[tuple[int, int, int]], other: list[tuple[int, int, int]]) -> None:
    traces = Trace.from_reads(one), Trace.from_reads(other)
    ranges = difference(*traces)
    found = {(layer, at) for layer, begin, end in ranges for at in range(begin, end)}
    assert found == bytes_of(traces[0]) - bytes_of(traces[1])
    assert all(begin < end for _, begin, end in ranges)


def test_select() -> None:
    trace = Trace.from_reads([(0, 0, 10), (1, 0, 10), (1, 5, 10), (2, 0, 1)])
    assert select(trace, layers=[1]).reads() == [(1, 0, 10), (1, 5, 10)]
    assert select(trace, sizes=[10, 14]).reads() == [(0, 0, 10), (1, 0, 10)]
    assert select(trace, layers=[1, 2], first=1).reads() == [(1, 0, 10)]


def test_a_table_and_back() -> None:
    capabilities.require_package("pandas")
    trace = Trace.from_reads([(0, 0, 10), (1, 0, 10), (0, 5, 10)])
    table = frame(trace)
    assert table["new"].tolist() == [10, 10, 5]
    assert table["end"].tolist() == [10, 10, 15]
    assert from_frame(table[table["new"] > 5]).reads() == [(0, 0, 10), (1, 0, 10)]
    assert len(frame(Trace.from_reads([]))) == 0
