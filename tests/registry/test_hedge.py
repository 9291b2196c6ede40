"""Requests that lag are sent once more, few of them, and whoever loses is broken off."""

from __future__ import annotations

import random
import threading
import time
from contextlib import closing

import pytest

from obdlab.call import UNBOUND, Call
from obdlab.registry import tries
from obdlab.registry.client import RegistryClient
from obdlab.registry.errors import RegistryError
from obdlab.registry.tries import Hedges
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry, faulty_registry

DATA = random.Random(5).randbytes(3 << 20)
DIGEST = faulty.digest_of(DATA)
LONG_S = 60.0
FIRST_LAG_S = 0.05


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_FIRST_LAG_S", FIRST_LAG_S)


def read(client: RegistryClient, registry: FaultyRegistry, offset: int, length: int = 1000) -> None:
    assert client.read_range(registry.repository(), DIGEST, offset, length) == DATA[offset : offset + length]


@pytest.mark.parametrize("lagging", [faulty.silence, faulty.drip, faulty.drip_headers])
def test_a_request_that_lags_is_overtaken(lagging: faulty.Fault) -> None:
    with (
        faulty_registry() as registry,
        closing(RegistryClient(request_timeout_s=LONG_S, deadline_s=LONG_S)) as client,
    ):
        registry.add_blob(DATA)
        registry.next(lagging)
        started = time.monotonic()
        read(client, registry, 0)
        assert time.monotonic() - started < LONG_S / 2
        assert len(registry.requests) == 2
        # The loser's connection is not used again.
        for offset in range(0, 50_000, 1000):
            read(client, registry, offset)


def test_only_a_share_is_sent_twice() -> None:
    count = 12
    with (
        faulty_registry() as registry,
        closing(RegistryClient(request_timeout_s=LONG_S, deadline_s=LONG_S)) as client,
    ):
        registry.add_blob(DATA)
        registry.always(faulty.slowly(0.3))
        for offset in range(0, count * 1000, 1000):
            read(client, registry, offset)
        # All of them lag, and after the few to begin with one in twenty is sent again.
        assert 1 <= len(registry.requests) - count <= 4


@pytest.mark.parametrize(("share", "length"), [(0.0, 1000), (0.05, tries.LARGEST + 1)])
def test_not_sent_twice(share: float, length: int) -> None:
    with faulty_registry() as registry, closing(RegistryClient(hedge_share=share)) as client:
        registry.add_blob(DATA)
        registry.always(faulty.slowly(10 * FIRST_LAG_S))
        read(client, registry, 0, length)
        assert len(registry.requests) == 1


def test_the_first_failure_is_told_if_both_fail() -> None:
    begun: list[str] = []
    both = threading.Barrier(2)

    def request(_: Call) -> None:
        name = threading.current_thread().name
        begun.append(name)
        both.wait(LONG_S)
        raise RegistryError(f"failed in {name}", temporary=True)

    with pytest.raises(RegistryError, match=threading.current_thread().name):
        Hedges().run("key", request, UNBOUND)
    assert begun == [threading.current_thread().name, "obdlab-hedge"]


def test_a_lag_is_that_of_the_latest_requests() -> None:
    lag = tries._Lag()
    for number in range(15):
        lag.add(0.5)
        assert lag.seconds == FIRST_LAG_S, number
    for seconds in (0.5, 0.1, 0.9, 0.001):
        for _ in range(600):
            lag.add(seconds)
        assert lag.seconds == max(seconds, tries._LEAST_LAG_S)
    for number in range(640):  # one in ten is slow, more than the share that counts as usual
        lag.add(2.0 if number % 10 == 0 else 0.1)
    assert lag.seconds == 2.0
    for number in range(640):
        lag.add(2.0 if number % 64 == 0 else 0.1)
    assert lag.seconds == 0.1


def test_without_threads_requests_are_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(tries, "_watch", tries._Watch())
        patch.setattr(threading.Thread, "start", no_thread)
        assert [Hedges().run("key", lambda _: "first", UNBOUND) for _ in range(3)] == ["first"] * 3


def test_the_second_may_save_the_first() -> None:
    second_is_there = threading.Event()

    def request(_: Call) -> str:
        if threading.current_thread().name == "obdlab-hedge":
            second_is_there.set()
            time.sleep(0.05)
            return "second"
        assert second_is_there.wait(LONG_S)
        raise RegistryError("the first fails meanwhile", temporary=True)

    assert Hedges().run("key", request, UNBOUND) == "second"


def test_a_loser_hears_of_it() -> None:
    heard = threading.Event()

    def request(call: Call) -> str:
        if threading.current_thread().name != "obdlab-hedge":
            return "first" if second.wait(LONG_S) else "late"
        second.set()
        end = time.monotonic() + LONG_S
        while not call.broken_off and time.monotonic() < end:
            time.sleep(0.001)
        if call.broken_off:
            heard.set()
        raise RegistryError("broken off", temporary=True)

    second = threading.Event()
    assert Hedges().run("key", request, UNBOUND) == "first"
    assert heard.wait(LONG_S)


def test_the_terms_of_both_requests_are_those_of_the_call() -> None:
    deadline, seen = time.monotonic() + LONG_S, []
    both = threading.Barrier(2)

    def request(call: Call) -> None:
        seen.append(call)
        both.wait(LONG_S)
        raise RegistryError("over", temporary=True)

    with pytest.raises(RegistryError):
        Hedges().run("key", request, Call(deadline))
    assert [call.deadline for call in seen] == [deadline, deadline]
    assert len({id(call.cancellation) for call in seen}) == 2
