"""When a server looks for the next request instead of sleeping, by clocks of the test's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from obdlab.devices import load, spinning
from obdlab.devices.load import Load
from obdlab.devices.spinning import LIMIT_NS, Spinning

US = 1000
REQUESTS = 100


class Clocks:
    """The clocks that the module reads, moved by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.process = self.thread = self.delay = 10**9
        clock = SimpleNamespace(
            monotonic_ns=lambda: self.now, process_time_ns=lambda: self.process, thread_time_ns=lambda: self.thread
        )
        monkeypatch.setattr(spinning, "time", clock)
        monkeypatch.setattr(load, "time", clock)
        monkeypatch.setattr(spinning, "_run_delay_ns", lambda: self.delay)

    def passes(self, us: float, *, mine: float = 0, others: float = 0, delay: float = 0) -> None:
        self.now += int(us * US)
        self.thread += int(mine * US)
        self.process += int((mine + others) * US)
        self.delay += int(delay * US)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    return Clocks(monkeypatch)


def looks(clocks: Clocks, spinning: Spinning, us_each: float, busy_us_each: float, **spent: float) -> int:
    clocks.passes(us_each * REQUESTS, **spent)
    spinning.look(REQUESTS, int(busy_us_each * REQUESTS * US))
    return spinning.limit_ns


@pytest.fixture
def chained(clocks: Clocks) -> Spinning:
    """One that has seen requests each of which came after the answer to the one before."""
    found = Spinning()
    found.look(REQUESTS, 0)
    assert not found.limit_ns  # the first look has nothing to compare with
    assert looks(clocks, found, 100, 30) == LIMIT_NS
    return found


def test_a_chain_of_requests(clocks: Clocks, chained: Spinning) -> None:
    assert looks(clocks, chained, 70, 25, mine=7000) == LIMIT_NS


@pytest.mark.parametrize(
    ("us_each", "busy_us_each"),
    [(300, 30), (1_000_000, 30), (33, 30), (30, 30)],
    ids=["rare requests", "an idle device", "requests that wait for each other", "no time between them"],
)
def test_nothing_to_gain(clocks: Clocks, chained: Spinning, us_each: float, busy_us_each: float) -> None:
    assert not looks(clocks, chained, us_each, busy_us_each)
    assert looks(clocks, chained, 100, 30) == LIMIT_NS


def test_other_threads_of_the_process_come_first(clocks: Clocks, chained: Spinning) -> None:
    assert not looks(clocks, chained, 100, 30, mine=9000, others=1000)
    assert looks(clocks, chained, 100, 30, mine=9000, others=10) == LIMIT_NS


def test_others_who_want_the_processor_come_first_for_a_while(clocks: Clocks, chained: Spinning) -> None:
    assert not looks(clocks, chained, 100, 30, delay=4000)
    assert not looks(clocks, chained, 100, 30)
    clocks.passes(200_000)
    chained.look(REQUESTS, 0)
    assert looks(clocks, chained, 100, 30) == LIMIT_NS


def test_a_wait_for_the_processor_counts_however_long_the_thread_waited_before(clocks: Clocks) -> None:
    clocks.delay = 1000 * US
    one = Spinning()
    one.look(REQUESTS, 0)
    assert looks(clocks, one, 100, 30) == LIMIT_NS
    assert not looks(clocks, one, 100, 30, delay=4000)


def test_another_thread_begins_anew(clocks: Clocks, chained: Spinning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.get_ident", lambda: 1)
    assert not looks(clocks, chained, 100, 30)
    assert looks(clocks, chained, 100, 30) == LIMIT_NS


def test_one_processor(clocks: Clocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    alone = Spinning()
    alone.look(REQUESTS, 0)
    assert not looks(clocks, alone, 100, 30)


@pytest.mark.parametrize(("us_each", "polls"), [(35, False), (35.1, True), (179.9, True), (180, False)])
def test_the_gap_between_answer_and_request_decides(
    clocks: Clocks, chained: Spinning, us_each: float, polls: bool
) -> None:
    assert looks(clocks, chained, us_each, 30) == (LIMIT_NS if polls else 0)  # gaps of 5 to 150 µs, ends excluded


@pytest.mark.parametrize(("others", "polls"), [(499, True), (500, False)])
def test_a_twentieth_of_the_time_for_other_threads_is_too_much(
    clocks: Clocks, chained: Spinning, others: float, polls: bool
) -> None:
    assert looks(clocks, chained, 100, 30, mine=5000, others=others) == (LIMIT_NS if polls else 0)


@pytest.mark.parametrize(("delay", "polls"), [(3000, True), (3001, False)])
def test_a_third_of_the_time_without_a_processor_is_too_much(
    clocks: Clocks, chained: Spinning, delay: float, polls: bool
) -> None:
    assert looks(clocks, chained, 100, 30, delay=delay) == (LIMIT_NS if polls else 0)


def test_polling_rests_for_a_tenth_of_a_second(clocks: Clocks, chained: Spinning) -> None:
    looks(clocks, chained, 100, 30, delay=4000)
    assert [looks(clocks, chained, 100, 30) for _ in range(11)] == [0] * 9 + [LIMIT_NS] * 2  # 10 ms each


@pytest.mark.parametrize(("text", "delay_ns"), [("7 1234 5\n", 1234), ("7\n", 0), ("", 0), ("7 x 5\n", 0), (None, 0)])
def test_the_time_without_a_processor_is_the_second_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, delay_ns: int
) -> None:
    if text is not None:
        (tmp_path / "schedstat").write_text(text)
    monkeypatch.setattr(spinning, "_SCHEDSTAT", tmp_path / "schedstat")
    assert spinning._run_delay_ns() == delay_ns


def test_a_new_thread_of_requests_does_not_poll() -> None:
    assert Spinning().limit_ns == 0


def high(clocks: Clocks, one: Load, us_each: float, busy_us_each: float) -> bool:
    clocks.passes(us_each * REQUESTS * 100)
    return one.is_high(REQUESTS * 100, int(busy_us_each * REQUESTS * 100 * US))


def test_a_helper_is_asked_for_when_requests_wait(clocks: Clocks) -> None:
    one = Load()
    high(clocks, one, 20, 15)
    assert high(clocks, one, 20, 15)
    assert not high(clocks, one, 20, 15)  # not again at once


def test_a_helper_would_only_take_turns_in_a_chain(clocks: Clocks) -> None:
    one = Load()
    high(clocks, one, 60, 40)
    assert not high(clocks, one, 60, 40)
    assert high(clocks, one, 45, 40)


def test_no_helper_for_what_is_mostly_idle(clocks: Clocks) -> None:
    one = Load()
    high(clocks, one, 12, 4)
    assert not high(clocks, one, 12, 4)


def test_a_helper_is_asked_for_again_after_two_seconds(clocks: Clocks) -> None:
    one = Load()
    high(clocks, one, 20, 15)
    assert high(clocks, one, 20, 15)
    assert [high(clocks, one, 20, 15) for _ in range(10)] == [False] * 9 + [True]  # a fifth of a second each


def loads(clocks: Clocks, ms: float, busy_ms: float, requests: int) -> bool:
    """Look twice, the second time after ``ms``; return what the second look says."""
    one = Load()
    one.is_high(1, 0)
    clocks.passes(ms * 1000)
    return one.is_high(requests, int(busy_ms * 1_000_000))


@pytest.mark.parametrize(
    ("ms", "busy_ms", "requests", "high"),
    [
        (50, 50, 1, True),
        (49.9, 49.9, 1, False),  # too short to say
        (1000, 1000, 1, True),
        (1000.1, 1000.1, 1, False),  # so long that it says nothing of the present
        (100, 50, 5000, True),
        (100, 49.9, 10_000, False),  # less than half of the time
        (100, 60, 4000, True),  # 10 µs between two requests
        (100, 60, 3999, False),
    ],
)
def test_limits_of_a_high_load(clocks: Clocks, ms: float, busy_ms: float, requests: int, high: bool) -> None:
    assert loads(clocks, ms, busy_ms, requests) is high


def test_looks_too_soon_after_each_other_add_up(clocks: Clocks) -> None:
    one = Load()
    one.is_high(1, 0)
    found = []
    for _ in range(5):
        clocks.passes(10_000)
        found.append(one.is_high(1000, 6_000_000))
    assert found == [False] * 4 + [True]
    clocks.passes(2_000_000)
    one.is_high(0, 0)  # forgets all before
    clocks.passes(50_000)
    assert not one.is_high(4999, 20_000_000)


def test_a_load_is_told_once_in_two_seconds(clocks: Clocks) -> None:
    one = Load()
    one.is_high(1, 0)
    found = []
    for _ in range(41):
        clocks.passes(50_000)
        found.append(one.is_high(5000, 50_000_000))
    assert found == [True] + [False] * 39 + [True]
