"""One experiment at a time on a host: two would share disk and page cache, and spoil each other's cold starts.

And one run at a time of a results directory: a run writes the declaration that "resume" and reports go by.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.lab.testbed.ownership import DEFAULT_STATE_DIR
from obdlab.lab.testbed.process import LabError
from obdlab.system.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def only_experiment(state_dir: Path = DEFAULT_STATE_DIR) -> Iterator[None]:
    """Hold the host for one experiment. Raises LabError at once, naming its process, while another one runs."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with _held(state_dir / "experiment.lock", "another experiment runs on this host"):
        yield


@contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Hold a results directory for one run. Raises LabError at once, naming its process, while another one runs."""
    with _held(directory / "run.lock", f"{directory}: another run writes here"):
        yield


@contextmanager
def _held(path: Path, refusal: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not try_lock(descriptor):
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise LabError(f"{refusal} (process {owner}): wait for it or stop it")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # this releases the lock; so does the kernel when the process is killed
