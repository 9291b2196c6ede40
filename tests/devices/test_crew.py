"""Leader and followers over a queue instead of /dev/fuse."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest

from obdlab.devices.crew import Crew, Member
from obdlab.waiting import about_to_wait

END = None


class Line:
    """Requests are functions; END ends the stream, for all threads."""

    def __init__(self, **options: float) -> None:
        self.requests: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.ran_by: list[int] = []
        self.crew = Crew(self.turn, **options)  # type: ignore[arg-type]
        self.crew.start()

    def turn(self, member: Member) -> bool:
        while True:
            request = self.requests.get()
            if request is END:
                return False
            self.ran_by.append(threading.get_ident())
            request()
            member.reads += 1
            if not member.leading:
                return True

    def end(self) -> None:
        self.requests.put(END)
        assert self.crew.wait(60)
        assert self.crew.size == 0


def nothing() -> None:
    pass


def test_one_thread_while_nobody_waits() -> None:
    line = Line()
    for _ in range(500):
        line.requests.put(nothing)
    line.end()
    assert len(set(line.ran_by)) == 1
    assert line.crew.totals().reads == 500


def test_another_leads_while_one_waits() -> None:
    line, gate, reached = Line(), threading.Event(), threading.Event()

    def slow() -> None:
        about_to_wait()
        assert gate.wait(60)

    line.requests.put(slow)
    line.requests.put(reached.set)
    assert reached.wait(60)
    assert line.crew.size == 2
    gate.set()
    line.end()
    assert line.crew.totals().reads == 2


def test_waiting_twice_gives_the_lead_away_once() -> None:
    line, gate, reached = Line(), threading.Event(), threading.Event()

    def slow() -> None:
        for _ in range(3):
            about_to_wait()
            assert gate.wait(60)

    line.requests.put(slow)
    line.requests.put(reached.set)
    assert reached.wait(60)
    gate.set()
    line.end()
    assert len(set(line.ran_by)) <= 2


def test_the_limit_is_kept_and_everything_is_answered() -> None:
    line, gate, sizes = Line(limit=4), threading.Event(), []

    def slow() -> None:
        sizes.append(line.crew.size)
        about_to_wait()
        assert gate.wait(60)

    for _ in range(40):
        line.requests.put(slow)
    threading.Timer(0.2, gate.set).start()
    line.end()
    assert line.crew.totals().reads == 40
    assert max(sizes) <= 4


def test_idle_followers_end() -> None:
    line, gate = Line(idle_s=0.05), threading.Event()

    def slow() -> None:
        about_to_wait()
        assert gate.wait(60)

    for _ in range(8):
        line.requests.put(slow)
    deadline = time.monotonic() + 60
    while line.crew.size < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    gate.set()
    while line.crew.size > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert line.crew.size == 1
    line.end()


def test_the_end_waits_for_requests_under_way() -> None:
    line, gate = Line(), threading.Event()

    def slow() -> None:
        about_to_wait()
        assert gate.wait(60)

    line.requests.put(slow)
    line.requests.put(END)
    assert not line.crew.wait(0.2)
    gate.set()
    assert line.crew.wait(60)
    assert line.crew.totals().reads == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_leader_that_fails_is_the_end_for_all() -> None:
    line, gate, reached = Line(idle_s=60), threading.Event(), threading.Event()

    def slow() -> None:
        about_to_wait()
        assert gate.wait(60)

    def fail() -> None:
        raise MemoryError

    line.requests.put(slow)
    line.requests.put(reached.set)
    assert reached.wait(60)
    gate.set()
    deadline = time.monotonic() + 60
    while line.crew.totals().reads < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert line.crew.size == 2  # one leads, one is idle
    line.requests.put(fail)
    assert line.crew.wait(60)
    for thread in threading.enumerate():  # its exception belongs to this test
        if thread.name == "crew":
            thread.join(60)


def test_a_storm_of_short_waits() -> None:
    line, count = Line(limit=16, idle_s=0.01), 3000

    def short() -> None:
        about_to_wait()
        time.sleep(0)

    for _ in range(count):
        line.requests.put(short)
    line.end()
    assert line.crew.totals().reads == count


def test_without_another_thread_the_leader_keeps_its_lead_and_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def turn(member: Member) -> bool:
        member.buffer = bytearray(b"a request")
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        about_to_wait()
        seen.append((member.leading, bytes(member.buffer)))
        return False

    crew = Crew(turn)
    crew.start()
    assert crew.wait(60)
    assert seen == [(True, b"a request")]
    assert crew.size == 0


def test_the_oldest_request_under_way_comes_first() -> None:
    gate, begun = threading.Event(), [3, 1, 2]
    ready = threading.Semaphore(0)

    def turn(member: Member) -> bool:
        if not begun:
            return False
        member.since_ns = begun.pop()
        about_to_wait()
        ready.release()
        assert gate.wait(60)
        member.since_ns = 0
        return True

    crew = Crew(turn, limit=3)
    crew.start()
    for _ in range(3):
        assert ready.acquire(timeout=60)
    ages = crew.under_way_s()
    gate.set()
    assert crew.wait(60)
    assert len(ages) == 3
    assert ages[0] > ages[1] > ages[2]
    assert crew.under_way_s() == ()
