"""One experiment at a time on a host: two would share disk and page cache, and spoil each other's cold starts."""

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
    descriptor = os.open(state_dir / "experiment.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not try_lock(descriptor):
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise LabError(f"another experiment runs on this host (process {owner}): wait for it or stop it")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # this releases the lock; so does the kernel when the process is killed
