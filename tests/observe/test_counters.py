"""Counting: labels, histograms, sums, what a fork begins with."""

from __future__ import annotations

import os
import threading

from hypothesis import given
from hypothesis import strategies as st

from obdlab.observe.counters import (
    TIME_SLOTS,
    Counter,
    Histogram,
    Table,
    add_to,
    counted,
    cumulated,
    times_table,
)


def test_threads_lose_no_count() -> None:
    counter, histogram = Counter("test_threads"), Histogram("test_times")

    def count() -> None:
        for _ in range(2000):
            counter.add(label="a")
            histogram.observe(0.001)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = counted()
    assert table["test_threads"] == {"a": 8000}
    assert table["test_times"]["20"] == 8000, "a millisecond is less than 2^20 ns, and more than half of that"
    assert abs(table["test_times"]["sum"] - 8.0) < 1e-6


def test_a_forked_process_begins_at_zero() -> None:
    Counter("test_fork").add(5)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        Counter("test_fork").add()
        os.write(writer, str(counted()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert stream.read() == "{'test_fork': {'': 1}}"
    assert os.waitpid(pid, 0)[1] == 0
    assert counted()["test_fork"] == {"": 5}


@given(st.lists(st.integers(1, 1 << 50)))
def test_both_ways_of_counting_times_agree(durations_ns: list[int]) -> None:
    slots = [0] * TIME_SLOTS
    for duration in durations_ns:
        slots[duration.bit_length()] += 1
    table = times_table(slots, sum(durations_ns))
    below, count, sum_s = cumulated(table, range(10, 40))
    assert count == len(durations_ns)
    assert abs(sum_s * 1e9 - sum(durations_ns)) <= 1e-6 * sum(durations_ns)
    assert below == [sum(duration < 1 << bits for duration in durations_ns) for bits in range(10, 40)]


tables = st.dictionaries(
    st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), st.integers(0, 1 << 40), max_size=3), max_size=3
)


@given(st.lists(tables))
def test_tables_add_up(parts: list[Table]) -> None:
    total: Table = {}
    for part in parts:
        add_to(total, part)
    for name in "abc":
        for label in "xyz":
            wanted = sum(part.get(name, {}).get(label, 0) for part in parts)
            assert total.get(name, {}).get(label, 0) == wanted
