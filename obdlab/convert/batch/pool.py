"""Pools that run the conversions of a list: processes of this host, or a scheduler's workers on several hosts.

Packages register pools on several hosts as ``conversions`` of the group ``obdlab.schedulers``.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, Self

from obdlab import plugins
from obdlab.convert.batch.job import Job, Outcome, run_job
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable


class Pool(Protocol):
    """Runs jobs. A context manager: the end of the block stops running jobs and waits for them."""

    def __enter__(self) -> Self:
        """Start the pool."""

    def __exit__(self, *_: object) -> None:
        """Stop running jobs."""

    def slots(self) -> int:
        """Return the number of jobs that may run at once."""

    def submit(self, job: Job, done: Callable[[Outcome], None]) -> None:
        """Start a job; ``done`` is called once, from any thread."""


class LocalPool:
    """Processes of this host."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._stopped = threading.Event()
        self._threads = ThreadPoolExecutor(jobs, "convert-list")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._threads.shutdown()

    def slots(self) -> int:
        return self._jobs

    def submit(self, job: Job, done: Callable[[Outcome], None]) -> None:
        self._threads.submit(lambda: done(run_job(job, self._stopped.is_set)))


def scheduled_pool(address: str) -> Pool:
    """Return the pool of the scheduler at ``address``. Raises ObdlabError if no package has one, and its errors."""
    pool: Callable[[str], Pool] | None = plugins.load("obdlab.schedulers", "conversions")
    if pool is None:
        raise ObdlabError(f"{address}: no installed package spreads conversions over hosts (obdlab.schedulers)")
    return pool(address)
