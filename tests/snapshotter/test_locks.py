"""One lock per snapshot: two threads are never in at once, and a lock that no thread wants is forgotten."""

from __future__ import annotations

import threading
import time

from obdlab.snapshotter.snapshots import KeyedLocks


def test_one_thread_at_a_time_and_nothing_is_kept() -> None:
    locks = KeyedLocks()
    inside = {1: 0, 2: 0}
    most = {1: 0, 2: 0}
    begin = threading.Barrier(6)

    def use(key: int) -> None:
        begin.wait(60)
        for _ in range(50):
            with locks.hold(key):
                inside[key] += 1
                most[key] = max(most[key], inside[key])
                time.sleep(0.0001)
                inside[key] -= 1

    threads = [threading.Thread(target=use, args=(1 + number % 2,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == {1: 1, 2: 1}
    assert locks._locks == {}


def test_a_lock_outlives_its_first_holder_while_another_waits() -> None:
    locks = KeyedLocks()
    held, go_on, third = threading.Event(), threading.Event(), threading.Event()

    def second() -> None:
        with locks.hold(7):
            held.set()
            assert go_on.wait(60)

    def last() -> None:
        with locks.hold(7):
            third.set()

    waiting = threading.Thread(target=second)
    with locks.hold(7):
        waiting.start()
        while locks._locks[7][1] < 2:
            time.sleep(0.001)
    assert held.wait(60)
    coming = threading.Thread(target=last)
    coming.start()
    assert not third.wait(0.1)
    go_on.set()
    assert third.wait(60)
    waiting.join(60)
    coming.join(60)
    assert locks._locks == {}


def test_another_snapshot_does_not_wait() -> None:
    locks = KeyedLocks()
    with locks.hold(1), locks.hold(2):
        assert set(locks._locks) == {1, 2}
    assert locks._locks == {}
