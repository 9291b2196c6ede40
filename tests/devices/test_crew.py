"""Leader and followers over a queue instead of /dev/fuse."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from obdlab.call import Call
from obdlab.devices.crew import Crew, Member
from obdlab.observe.counters import times_table

END = None


class Line:
    """Requests are functions; END ends the stream, for all threads."""

    def __init__(self, **options: float) -> None:
        self.requests: queue.Queue[Callable[[Call], object] | None] = queue.Queue()
        self.ran_by: list[int] = []
        self.crew = Crew(self.turn, **options)  # type: ignore[arg-type]
        self.crew.start()

    def turn(self, member: Member) -> bool:
        while True:
            request = self.requests.get()
            if request is END:
                return False
            self.ran_by.append(threading.get_ident())
            request(member.call)
            member.reads += 1
            if not member.leading:
                return True

    def end(self) -> None:
        self.requests.put(END)
        assert self.crew.wait(60)
        assert self.crew.size == 0


def nothing(call: Call) -> None:
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

    def slow(call: Call) -> None:
        call.about_to_wait()
        assert gate.wait(60)

    line.requests.put(slow)
    line.requests.put(lambda _: reached.set())
    assert reached.wait(60)
    assert line.crew.size == 2
    gate.set()
    line.end()
    assert line.crew.totals().reads == 2


def test_waiting_twice_gives_the_lead_away_once() -> None:
    line, gate, reached = Line(), threading.Event(), threading.Event()

    def slow(call: Call) -> None:
        for _ in range(3):
            call.about_to_wait()
            assert gate.wait(60)

    line.requests.put(slow)
    line.requests.put(lambda _: reached.set())
    assert reached.wait(60)
    gate.set()
    line.end()
    assert len(set(line.ran_by)) <= 2


def test_the_limit_is_kept_and_everything_is_answered() -> None:
    line, gate, sizes = Line(limit=4), threading.Event(), []

    def slow(call: Call) -> None:
        sizes.append(line.crew.size)
        call.about_to_wait()
        assert gate.wait(60)

    for _ in range(40):
        line.requests.put(slow)
    threading.Timer(0.2, gate.set).start()
    line.end()
    assert line.crew.totals().reads == 40
    assert max(sizes) <= 4


def test_idle_followers_end() -> None:
    line, gate = Line(idle_s=0.05), threading.Event()

    def slow(call: Call) -> None:
        call.about_to_wait()
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

    def slow(call: Call) -> None:
        call.about_to_wait()
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

    def slow(call: Call) -> None:
        call.about_to_wait()
        assert gate.wait(60)

    def fail(call: Call) -> None:
        raise MemoryError

    line.requests.put(slow)
    line.requests.put(lambda _: reached.set())
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

    def short(call: Call) -> None:
        call.about_to_wait()
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
        member.call.about_to_wait()
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
        member.call.about_to_wait()
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


def counted(factor: int) -> Member:
    """Return a member whose counters are all different."""
    member = Member(
        reads=factor, read_bytes=2 * factor, writes=3 * factor, written_bytes=4 * factor, errors=5 * factor
    )
    member.slowest_ns, member.read_ns, member.write_ns = 6 * factor, 7 * factor, 8 * factor
    member.read_times[factor] = 9 * factor
    member.write_times[factor] = 10 * factor
    return member


def test_counters_add_up_and_the_slowest_request_stays_the_slowest() -> None:
    total = Member()
    table = total.read_times
    for factor in (1, 3, 2):
        total.add(counted(factor))
    assert (total.reads, total.read_bytes, total.writes, total.written_bytes, total.errors) == (6, 12, 18, 24, 30)
    assert (total.slowest_ns, total.read_ns, total.write_ns) == (18, 42, 48)
    assert total.read_times[:5] == [0, 9, 18, 27, 0]
    assert total.write_times[:5] == [0, 10, 20, 30, 0]
    assert total.read_times is table
    assert len(total.read_times) == len(total.write_times) == len(counted(1).read_times)


def test_statistics_name_every_counter_and_past_threads_count() -> None:
    def turn(member: Member) -> bool:
        member.add(counted(3))
        member.slowest_ns = 2_500_000
        return False

    crew = Crew(turn)
    crew.start()
    assert crew.wait(60)
    found = crew.statistics("the last error")
    assert (found.reads, found.read_bytes, found.writes, found.written_bytes, found.errors) == (3, 6, 9, 12, 15)
    assert (found.slowest_ms, found.threads, found.last_error, found.under_way_s) == (2.5, 0, "the last error", ())
    assert found.read_times == times_table(counted(3).read_times, 21)
    assert found.write_times == times_table(counted(3).write_times, 24)
    assert found.read_times != found.write_times


def test_a_request_under_way_has_an_age_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(lambda _: False)
    monkeypatch.setattr("obdlab.devices.crew.time", SimpleNamespace(monotonic_ns=lambda: 5_000_000_000))
    crew._members |= {Member(since_ns=2_000_000_000), Member(), Member(since_ns=1_500_000_000)}
    assert crew.under_way_s() == (3.5, 3.0)


def buffers_after_a_wait(*, needed: bool) -> tuple[bytes, bytes]:
    """Return the buffers of a member that gave its lead away, and of the next leader, as the latter sees them."""
    members: list[Member] = []
    seen: list[tuple[bytes, bytes]] = []
    gate = threading.Event()

    def turn(member: Member) -> bool:
        members.append(member)
        if len(members) == 1:
            member.buffer, member.needs_buffer = bytearray(b"a request"), needed
            member.call.about_to_wait()
            assert gate.wait(60)
        else:
            seen.append((bytes(members[0].buffer), bytes(member.buffer)))
            gate.set()
        return False

    crew = Crew(turn)
    crew.start()
    assert crew.wait(60)
    return seen[0]


def test_the_buffer_goes_with_the_lead_unless_its_content_is_needed() -> None:
    assert Member().needs_buffer is False
    assert buffers_after_a_wait(needed=False) == (b"", b"a request")
    assert buffers_after_a_wait(needed=True) == (b"a request", b"")


def test_a_follower_chosen_at_the_last_moment_leads() -> None:
    turns: list[bool] = []
    crew = Crew(lambda member: bool(turns.append(member.leading)) or len(turns) < 2)

    class Late:
        """A semaphore whose time runs out while another thread chooses the member."""

        def acquire(self, timeout: float | None = None) -> bool:
            if timeout is not None:
                crew._idle.remove(member)
                member.leading = True
            return timeout is None

    member = Member(wake=Late())  # type: ignore[arg-type]
    crew._members.add(member)
    crew._run(member)
    assert turns == [False, True]
    assert crew.wait(0)


def test_a_follower_without_work_leaves_after_its_time() -> None:
    waited: list[float | None] = []

    class Never:
        def acquire(self, timeout: float | None = None) -> bool:
            waited.append(timeout)
            return False

    crew = Crew(lambda _: True, idle_s=7.0)
    member = Member(wake=Never())  # type: ignore[arg-type]
    assert crew._lead_again(member) is False
    assert waited == [7.0]
    assert crew._idle == []


def test_threads_have_the_name_of_their_crew_and_do_not_keep_a_process_alive() -> None:
    seen: list[threading.Thread] = []
    crew = Crew(lambda _: bool(seen.append(threading.current_thread())), name="fuse")
    assert crew.wait(0) is False
    crew.start()
    assert crew.wait(60) is True
    assert (seen[0].name, seen[0].daemon) == ("fuse", True)
