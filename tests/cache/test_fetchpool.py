from __future__ import annotations

import queue
import threading

import pytest

from obdlab.cache import fetchpool
from obdlab.cache.fetchpool import FetchPool


def test_jobs_run_and_a_full_queue_says_so() -> None:
    pool = FetchPool(threads=1, queued=2)
    gate, ran = threading.Event(), threading.Semaphore(0)

    def job() -> None:
        gate.wait(60)
        ran.release()

    accepted = [pool.submit(job) for _ in range(10)]
    assert accepted.count(True) in (2, 3)  # one may have left the queue already
    gate.set()
    for _ in range(accepted.count(True)):
        assert ran.acquire(timeout=60)


def test_each_job_has_a_thread_while_there_are_any() -> None:
    for _ in range(50):
        pool = FetchPool(threads=8, queued=8)
        together = threading.Barrier(8)
        done = threading.Semaphore(0)

        def job(together: threading.Barrier = together, done: threading.Semaphore = done) -> None:
            together.wait(60)
            done.release()

        assert all(pool.submit(job) for _ in range(8))
        assert all(done.acquire(timeout=60) for _ in range(8))


def test_no_thread_to_be_had_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FetchPool(threads=2, queued=8)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert not pool.submit(lambda: None)
    done = threading.Event()
    assert pool.submit(done.set)
    assert done.wait(60)


def test_a_thread_without_work_ends_and_the_next_job_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetchpool, "_IDLE_S", 0.01)
    pool = FetchPool(threads=1, queued=2)
    for _ in range(3):
        workers: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
        assert pool.submit(lambda workers=workers: workers.put(threading.current_thread()))
        worker = workers.get(timeout=60)
        worker.join(60)
        assert not worker.is_alive()
