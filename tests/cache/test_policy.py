"""The decisions about what is fetched next: the table, and what holds in every situation."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.cache.policy import (
    LARGEST_PIECE,
    PIECE,
    Part,
    Situation,
    Step,
    Why,
    is_fast,
    most_likely,
    next_step,
    pace,
    speed,
)

MBIT = 125_000
MIB = 1 << 20
SLOW, FAST = 100 * MBIT, 1000 * MBIT
#: Everything allows to fetch.
FREE = Situation(left=64 * MIB, wait_s=0.02, rate=FAST, at_once=True, early_s=300)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, Why.FETCH),
        ({"left": 0}, Why.DONE),
        ({"left": 0, "metered": True}, Why.DONE),
        ({"metered": True}, Why.METERED),
        ({"metered": True, "quiet_s": 0.0}, Why.METERED),
        ({"quiet_s": 0.0}, Why.READER),
        ({"quiet_s": 0.03}, Why.READER),
        ({"quiet_s": 0.06}, Why.FETCH),
        ({"announced": True}, Why.ANNOUNCED),
        ({"announced": True, "quiet_s": 0.0}, Why.READER),
        ({"rate": SLOW}, Why.DELAY),
        ({"rate": 0.0, "wait_s": 0.0}, Why.DELAY),
        ({"rate": SLOW, "early_s": -1.0}, Why.FETCH),
        ({"rate": 0.0, "wait_s": 0.0, "early_s": -1.0}, Why.FETCH),
        ({"at_once": False}, Why.DELAY),
        ({"at_once": False, "early_s": -1.0}, Why.FETCH),
        ({"allowed": 100_000}, Why.BUDGET),
        ({"limited_s": 0.1}, Why.RATE),
        ({"under_way": 3 * MIB}, Why.ENOUGH),
        ({"under_way": 2 * MIB}, Why.FETCH),
        ({"rate": SLOW, "early_s": -1.0, "under_way": PIECE}, Why.ENOUGH),
    ],
)
def test_the_table(changes: dict[str, object], why: Why) -> None:
    assert next_step(replace(FREE, **changes)).why is why  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mbit", "wait_s", "fast", "piece", "number"),
    [
        (0, 0, False, PIECE, 1),
        (100, 0.02, False, PIECE, 1),
        (200, 0.02, False, PIECE, 1),
        (250, 0.0005, True, PIECE, 1),
        (250, 0.02, True, 192 << 10, 4),
        (1000, 0.0005, True, MIB, 1),
        (1000, 0.005, True, 576 << 10, 2),
        (1000, 0.02, True, 768 << 10, 4),
        (9999, 0.1, True, 1024 << 10, 8),
    ],
)
def test_the_link_decides(mbit: int, wait_s: float, fast: bool, piece: int, number: int) -> None:
    got, requests = pace(wait_s, mbit * MBIT)
    assert (is_fast(mbit * MBIT), requests) == (fast, number)
    assert piece - (64 << 10) <= got <= piece


def test_the_layer_that_is_read_goes_first_and_the_application_before_its_base() -> None:
    assert most_likely([Part(10, 0), Part(10, 0)]) == 1
    assert most_likely([Part(100, 20), Part(10, 1), Part(10, 0)]) == 0
    assert most_likely([Part(100, 20), Part(10, 5), Part(0, 0)]) == 1


def test_a_link_whose_pieces_share_it() -> None:
    class Link:
        wait_s, bytes_per_wait = 0.02, 0.02 * SLOW

    assert speed(None) == (0.0, 0.0)
    assert speed(Link())[1] == pytest.approx(SLOW)
    assert speed(Link(), FAST) == (0.02, FAST)


situations = st.builds(
    Situation,
    left=st.integers(0, 1 << 40),
    under_way=st.integers(0, 1 << 24),
    wait_s=st.floats(0, 2),
    rate=st.floats(0, 1 << 34),
    quiet_s=st.floats(0, 1),
    announced=st.booleans(),
    early_s=st.floats(-10, 400),
    at_once=st.booleans(),
    limited_s=st.floats(-1, 10),
    allowed=st.just(math.inf) | st.integers(0, 1 << 30).map(float),
    metered=st.booleans(),
)


@given(situations)
def test_in_every_situation(now: Situation) -> None:
    step = next_step(now)
    assert (step.length > 0) == (step.why is Why.FETCH)
    assert step.length <= min(now.left, LARGEST_PIECE, now.allowed)
    if step.length:
        assert not now.metered
        assert not now.announced
        assert now.quiet_s > 0
        assert now.limited_s <= 0
        assert now.early_s <= 0 or is_fast(now.rate)
        # The bytes queued before a reader's answer, after those that are on their way in any case.
        piece, _ = pace(now.wait_s, now.rate)
        assert not is_fast(now.rate) or now.under_way + step.length - now.rate * now.wait_s <= piece + 1
    elif step.why not in (Why.DONE, Why.METERED):
        assert step.pause_s > 0


@given(situations)
def test_a_reader_in_wait_stops_it(now: Situation) -> None:
    assert next_step(replace(now, quiet_s=0.0)).length == 0


@given(st.floats(0, 2), st.floats(0, 1 << 34))
def test_the_first_piece_may_always_go(wait_s: float, rate: float) -> None:
    piece, number = pace(wait_s, rate)
    assert 64 << 10 <= piece <= LARGEST_PIECE
    assert 1 <= number <= 8
    now = Situation(left=1 << 40, wait_s=wait_s, rate=rate)
    assert next_step(now) == Step(Why.FETCH, piece)


# -- a simulated link ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    took_s: float
    bytes: int
    #: The longest that a reader waited beyond what its request takes on an idle link, and the time of one piece.
    delayed_s: float
    piece_s: float


def simulate(size: int, rate: float, wait_s: float, reads: list[tuple[float, int]], until_s: float = 1e9) -> Run:
    """Complete an image of ``size`` bytes while a reader asks for (time, length): requests queue in the server."""
    clock, free_at, left, under_way, came = 0.0, 0.0, size, 0, 0
    arrivals: list[tuple[float, int, bool]] = []
    reads, waiting, quiet_since, delayed = sorted(reads), 0, -1.0, 0.0

    def request(now: float, length: int) -> float:
        nonlocal free_at
        free_at = max(now + wait_s, free_at) + length / rate
        return free_at

    while (left or under_way or reads) and clock < until_s:
        while reads and reads[0][0] <= clock:
            _, length = reads.pop(0)
            ends = request(clock, length)
            delayed = max(delayed, ends - clock - wait_s - length / rate)
            heapq.heappush(arrivals, (ends, length, True))
            waiting += 1
        quiet = 0.0 if waiting else clock - quiet_since
        now = Situation(
            left=left, under_way=under_way, wait_s=wait_s, rate=rate, quiet_s=quiet, at_once=True, early_s=300 - clock
        )
        step = next_step(now)
        if step.length:
            left -= step.length
            under_way += step.length
            heapq.heappush(arrivals, (request(clock, step.length), step.length, False))
            continue
        events = [clock + step.pause_s] if step.why is not Why.DONE else []
        events += [arrivals[0][0]] if arrivals else []
        events += [reads[0][0]] if reads else []
        if not events:
            break
        clock = max(clock + 1e-6, min(events))
        while arrivals and arrivals[0][0] <= clock:
            _, length, is_reader = heapq.heappop(arrivals)
            if is_reader:
                waiting, quiet_since = waiting - 1, clock
            else:
                under_way, came = under_way - length, came + length
    return Run(clock, came, delayed, pace(wait_s, rate)[0] / rate)


@pytest.mark.parametrize("wait_s", [0.0005, 0.005, 0.02])
def test_on_a_fast_link_it_takes_about_as_long_as_a_pull(wait_s: float) -> None:
    size = 100 * MIB
    run = simulate(size, FAST, wait_s, [])
    assert run.bytes == size
    assert run.took_s <= 1.15 * (size / FAST + wait_s)


@pytest.mark.parametrize("wait_s", [0.0005, 0.005, 0.02])
@pytest.mark.parametrize("rate", [FAST, 10 * FAST])
def test_a_reader_is_delayed_by_one_request_at_most(rate: float, wait_s: float) -> None:
    run = simulate(400 * MIB, rate, wait_s, [(number / 7, 256 << 10) for number in range(20)])
    assert 0 < run.delayed_s <= run.piece_s + 1e-9


def test_on_a_slow_link_nothing_comes_that_was_not_asked_for() -> None:
    run = simulate(100 * MIB, SLOW, 0.02, [(1.0, 256 << 10)], until_s=299)
    assert run.bytes == 0
    late = simulate(10 * MIB, SLOW, 0.02, [])
    assert late.bytes == 10 * MIB
    assert late.took_s > 300
