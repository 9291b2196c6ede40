"""Waiting for processes."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator

import pytest

from obdlab.service.rundir import Process

MANY = 1100  # more descriptors than select(2) takes


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * MANY:
        pytest.skip(f"no {2 * MANY} open files allowed here (hard limit {hard})")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * MANY), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(MANY)]
    yield
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_a_process_is_ended_by_one_with_many_descriptors() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        process = Process.of(sleeper.pid)
        assert process is not None
        process.end(0.05)
        assert sleeper.wait(10) == -9
    assert not process.alive
