"""A few background threads for optional work."""

from __future__ import annotations

import logging
import os
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_IDLE_S = 10.0


class FetchPool:
    """Runs jobs in daemon threads, which start when there is work and end after a while without any."""

    def __init__(self, threads: int, queued: int) -> None:
        self._max_threads = threads
        self._max_queued = queued
        self._reset()
        # Threads do not survive a fork, and the lock may be held at that moment.
        os.register_at_fork(after_in_child=self._reset)

    def submit(self, job: Callable[[], None]) -> bool:
        """Queue ``job``. Return False if the queue is full or no thread can be started. Jobs must not raise."""
        with self._lock:
            if self._jobs.qsize() >= self._max_queued:
                return False
            if self._unfinished >= self._threads and self._threads < self._max_threads:
                self._add_thread()
            if self._threads == 0:
                return False
            self._unfinished += 1
            self._jobs.put(job)
        return True

    def _add_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name="obdlab-fetch", daemon=True).start()
        except RuntimeError:  # the system has no more threads; the running ones suffice
            return
        self._threads += 1

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = 0
        # Jobs in the queue and in threads. (A count of waiting threads would have those that have just taken a job.)
        self._unfinished = 0

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                job()
            except Exception:
                logger.exception("background fetch failed unexpectedly")
            with self._lock:
                self._unfinished -= 1

    def _next_job(self) -> Callable[[], None] | None:
        try:
            return self._jobs.get(timeout=_IDLE_S)
        except queue.Empty:
            pass
        with self._lock:
            # A job may have been queued since the time-out, counting on this thread.
            try:
                return self._jobs.get_nowait()
            except queue.Empty:
                self._threads -= 1
                return None
