"""Conversions of a list by the workers of a Dask scheduler.

Source: Dask.distributed documentation, "Client", "Futures", "Coordination Primitives".
"""

from __future__ import annotations

import importlib
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Self

from obdlab.command import install_command
from obdlab.convert.batch.job import Job, Outcome, run_job
from obdlab.errors import ObdlabError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable

_CONNECT_S = 20.0
# Seconds between a worker's checks for a stopped run.
_ASK_S = 2.0
# Seconds for workers to end their current job.
_END_S = 60.0


class DaskPool:
    """The workers of a Dask scheduler, which must have this package installed; one job per worker thread.

    Workers may come and go: the scheduler gives the job of a lost worker to another. Raises ObdlabError if Dask is
    not installed, SourceError if the scheduler does not answer.
    """

    def __init__(self, address: str) -> None:
        distributed = _dask()
        try:
            self._client: Any = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise SourceError(f"Dask scheduler does not answer: {error}", blob=address, temporary=True) from error
        self._address = address
        self._name = f"obdlab-stop-{uuid.uuid4()}"
        self._stop: Any = distributed.Event(self._name, client=self._client)
        self._futures: set[Any] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._lock:
                running = list(self._futures)
            if running and self._client.status == "running":
                self._stop.set(timeout=_CONNECT_S)
                self._client.cancel([one for one in running if not self._is_processing(one)])
                deadline = time.monotonic() + _END_S
                while any(not one.done() for one in running) and time.monotonic() < deadline:
                    time.sleep(0.1)
        except OSError:
            pass  # the scheduler is gone: its workers notice
        finally:
            self._client.close(timeout=_CONNECT_S)

    def slots(self) -> int:
        # Without a worker, one job waits at the scheduler for the first.
        try:
            threads: dict[str, int] = self._client.nthreads()
        except (OSError, TypeError) as error:
            raise SourceError(f"the Dask scheduler is gone: {error}", blob=self._address, temporary=True) from error
        return max(1, sum(threads.values()))

    def submit(self, job: Job, done: Callable[[Outcome], None]) -> None:
        # pure=False: the same job may have to run again.
        future = self._client.submit(run_on_worker, job, self._name, pure=False)
        with self._lock:
            self._futures.add(future)

        def told(future: Any) -> None:
            with self._lock:
                self._futures.discard(future)
            done(_outcome_of(future))

        future.add_done_callback(told)

    def _is_processing(self, future: Any) -> bool:
        return any(future.key in keys for keys in self._client.processing().values())


def run_on_worker(job: Job, stop_name: str) -> Outcome:
    """Run a job in a Dask worker's thread, until its run is stopped or its scheduler is gone."""
    stop = _dask().Event(stop_name)
    asked_at = time.monotonic()

    def stopped() -> bool:
        nonlocal asked_at
        if time.monotonic() - asked_at < _ASK_S:
            return False
        asked_at = time.monotonic()
        try:
            return bool(stop.is_set())
        except OSError:
            return True

    return run_job(job, stopped)


def _dask() -> Any:
    # Imported late, since it is large and optional.
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise ObdlabError(f"spreading over hosts needs Dask: {install_command('mass')}") from error


def _outcome_of(future: Any) -> Outcome:
    if future.status == "finished":
        result = future.result()
        assert isinstance(result, Outcome)
        return result
    if future.status == "cancelled":
        return Outcome(error="stopped", temporary=True)
    error = future.exception()
    return Outcome(error=f"worker: {type(error).__name__}: {error}", temporary=True)
