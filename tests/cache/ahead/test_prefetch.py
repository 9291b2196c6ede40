"""Ordering a trace into requests, and fetching them around what readers do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.cache.ahead.prefetch import Piece, Prefetch, Range, plan
from obdlab.cache.cachedblob import CachedBlob
from obdlab.call import Call
from obdlab.errors import SourceError
from tests.cache.origin import DATA, UNIT, Origin, open_cached, wait_until

UNITS = -(-len(DATA) // UNIT)
RANGES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3 << 20), st.integers(1, 200_000)), max_size=30)


def units_of(ranges: list[Range], size: int) -> set[tuple[int, int]]:
    return {(blob, unit) for blob, begin, end in ranges for unit in range(begin // size, -(-end // size))}


@given(RANGES)
def test_a_plan_has_every_unit_once_and_little_else(reads: list[tuple[int, int, int]]) -> None:
    ranges = [(blob, at, at + length) for blob, at, length in reads]
    pieces = list(plan(ranges, [UNIT, UNIT]))
    planned = [(piece.blob, unit) for piece in pieces for unit in range(piece.first, piece.stop)]
    wanted = units_of(ranges, UNIT)
    # A gap that is filled may turn out to be read later: those units come twice, and are found to be there.
    assert set(planned) >= wanted
    assert len(planned) <= 1.08 * len(wanted)
    assert all((piece.stop - piece.first) * UNIT <= 1 << 20 for piece in pieces)


def test_order_of_first_use_and_adjacent_ones_as_one() -> None:
    ranges = [(1, 9 * UNIT, 10 * UNIT), (0, 5 * UNIT, 6 * UNIT), (1, 8 * UNIT, 9 * UNIT), (0, 2 * UNIT, 2 * UNIT + 1)]
    assert list(plan(ranges, [UNIT, UNIT])) == [Piece(1, 8, 10), Piece(0, 5, 6), Piece(0, 2, 3)]


def test_a_trace_that_names_all_again_and_again_is_planned_in_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size, looked_at = 4096 * UNIT, 0

    def find() -> Iterator[Range]:
        nonlocal looked_at
        for number in range(100_000):
            looked_at = number
            yield 0, 0, size

    with open_cached(tmp_path, Origin(bytes(size))) as blob:
        made = Prefetch("trace", [blob], find)
        made.start()
        assert made.wait(60)
        assert blob.statistics()["prefetch_bytes"] == size
    assert looked_at < 20_000
    assert "trace: names the same data again and again" in caplog.text


def test_planning_can_be_stopped(tmp_path: Path) -> None:
    begun, over = threading.Event(), threading.Event()

    def find() -> Iterator[Range]:
        while not over.wait(0.001):
            begun.set()
            yield 0, 0, UNIT

    with open_cached(tmp_path, source := Origin()) as blob:
        made = Prefetch("trace", [blob], find)
        made.start()
        try:
            assert begun.wait(60)
            made.stop()
            assert made.wait(10)
        finally:
            over.set()
            made.wait(60)
    assert source.reads == []


def prefetched(blob: CachedBlob, ranges: list[Range]) -> Prefetch:
    made = Prefetch("trace", [blob], lambda: ranges)
    made.start()
    return made


def test_what_was_fetched_is_not_asked_for_again_and_is_counted(tmp_path: Path) -> None:
    source = Origin()
    with open_cached(tmp_path, source) as blob:
        assert prefetched(blob, [(0, 3 * UNIT, 7 * UNIT), (0, 20 * UNIT, 21 * UNIT)]).wait(60)
        assert sorted(source.reads) == [(3 * UNIT, 4 * UNIT), (20 * UNIT, UNIT)]
        assert blob.read_at(4 * UNIT + 1, 2 * UNIT) == DATA[4 * UNIT + 1 : 6 * UNIT + 1]
        assert blob.read_at(4 * UNIT, 10) == DATA[4 * UNIT : 4 * UNIT + 10]
        assert len(source.reads) == 2
        counted = blob.statistics()
    assert counted["prefetch_bytes"] == 5 * UNIT
    assert (counted["prefetch_used_bytes"], counted["prefetch_hits"]) == (3 * UNIT, 1)
    assert (counted["misses"], counted["demand_bytes"]) == (0, 0)


def test_units_of_two_blobs_are_no_neighbours() -> None:
    ranges = [(0, 0, 4 * UNIT), (1, 4 * UNIT, 6 * UNIT)]
    assert list(plan(ranges, [UNIT, UNIT])) == [Piece(0, 0, 4), Piece(1, 4, 6)]


@pytest.mark.parametrize(
    ("error", "level", "line"),
    [
        (SourceError("no trace"), "WARNING", "trace: not replayed: no trace"),
        (ValueError("no trace"), "ERROR", "trace: replay failed unexpectedly"),
    ],
)
def test_a_trace_that_cannot_be_read_is_logged_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, level: str, line: str
) -> None:
    def find() -> list[Range]:
        raise error

    with open_cached(tmp_path, source := Origin()) as blob:
        made = Prefetch("trace", [blob], find)
        made.start()
        assert made.wait(60)
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [(level, line)]
        assert blob.read_at(0, len(DATA)) == DATA
    assert source.closed == 1  # nothing holds the blob


def test_nothing_is_begun_while_an_unexpected_reader_waits(tmp_path: Path) -> None:
    release, waits = threading.Event(), threading.Event()

    def before(offset: int, length: int) -> None:
        if offset == 0:
            waits.set()
            release.wait(60)

    source = Origin(before=before)
    with open_cached(tmp_path, source) as blob:
        reader = threading.Thread(target=blob.read_at, args=(0, 10))
        reader.start()
        assert waits.wait(60)
        running = prefetched(blob, [(0, 3 * UNIT, 4 * UNIT)])
        assert not running.wait(0.3)
        assert len(source.reads) == 1
        release.set()
        assert running.wait(60)
        reader.join()
    assert source.reads == [(0, UNIT), (3 * UNIT, UNIT)]


class Gauge(Origin):
    """Counts the bytes of the reads in flight; the first waits for a second one."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.in_flight = self.most = 0
        self._lock, self._second = threading.Lock(), threading.Event()

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        with self._lock:
            self.in_flight += length
            self.most = max(self.most, self.in_flight)
            if self.in_flight > length:
                self._second.set()
        assert self._second.wait(60)
        time.sleep(0.02)  # time for the others to begin, if they may
        with self._lock:
            self.in_flight -= length
        return super().read_at(offset, length, call)


def test_several_requests_are_in_flight_but_few_bytes(tmp_path: Path) -> None:
    with open_cached(tmp_path, source := Gauge(bytes(12 << 20))) as blob:
        assert prefetched(blob, [(0, 0, 12 << 20)]).wait(60)
        assert blob.statistics()["prefetch_bytes"] == 12 << 20
    assert max(length for _, length in source.reads) < source.most <= 2 << 20


def test_a_reader_ahead_takes_only_what_he_needs(tmp_path: Path) -> None:
    with open_cached(tmp_path, source := Origin(), extent=8 * UNIT) as blob:
        blob.opened(120.0)
        blob.expect(b"\1" * UNITS)
        blob.read_at(3 * UNIT, 10)
        blob.expect(b"")
        blob.read_at(9 * UNIT, 10)
    assert source.reads == [(3 * UNIT, UNIT), (8 * UNIT, 8 * UNIT)]


def test_a_reader_ahead_of_a_replay_takes_only_what_he_needs(tmp_path: Path) -> None:
    release = threading.Event()

    def before(offset: int, length: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            release.wait(60)

    with open_cached(tmp_path, source := Origin(before=before), extent=8 * UNIT) as blob:
        blob.opened(120.0)
        running = prefetched(blob, [(0, unit * UNIT, (unit + 1) * UNIT) for unit in range(0, 40, 3)])
        wait_until(lambda: len(source.reads) == 8)  # all that it has in flight at once
        blob.read_at(36 * UNIT, 10)
        assert source.reads[8:] == [(36 * UNIT, UNIT)]
        assert blob.statistics()["demand_bytes"] == UNIT
        release.set()
        assert running.wait(60)
        assert sorted(source.reads) == [(unit * UNIT, UNIT) for unit in range(0, 40, 3)]


def test_failures_end_it_and_readers_try_for_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def before(offset: int, length: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SourceError("down", temporary=True)

    with open_cached(tmp_path, source := Origin(before=before)) as blob:
        ranges = [(0, unit * UNIT, (unit + 1) * UNIT) for unit in range(0, UNITS - 1, 2)]
        assert prefetched(blob, ranges).wait(60)
        assert 3 <= len(source.reads) <= 3 + 8 < len(ranges)
        assert blob.read_at(0, 10) == DATA[:10]
        assert blob.statistics()["prefetch_used_bytes"] == 0
    assert "prefetching failed" in caplog.text


def test_another_programs_trace_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    def before(offset: int, length: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            release.wait(60)

    with open_cached(tmp_path, source := Origin(before=before)) as blob:
        # Three apart: a single unit between two would be fetched with them, and its reader wait for that.
        running = prefetched(blob, [(0, unit * UNIT, (unit + 1) * UNIT) for unit in range(0, 40, 3)])
        wait_until(lambda: len(source.reads) == 8)
        for unit in (unit for unit in range(1, 33) if unit % 3):
            blob.read_at(unit * UNIT, 10)
        release.set()
        assert running.wait(60)
        assert blob.statistics()["prefetch_bytes"] == 8 * UNIT  # no request more
    assert "given up" in caplog.text


def test_closing_ends_it(tmp_path: Path) -> None:
    blob = open_cached(tmp_path, source := Origin(before=lambda offset, length: time.sleep(0.05)))
    running = prefetched(blob, [(0, unit * UNIT, (unit + 1) * UNIT) for unit in range(0, 40, 2)])
    wait_until(lambda: len(source.reads) > 0)
    blob.close()
    assert running.wait(60)
    assert len(source.reads) < 20
    assert source.closed == 1
