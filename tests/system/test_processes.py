"""Facts about other processes, signals to them, and waiting for them."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from obdlab.system.processes import Process, Stat, has_ended, stat_of, thread_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
        assert sleeper.wait(60) == -9
    assert not process.alive


def test_a_zombie_does_not_run_but_the_kernel_still_counts_it() -> None:
    child = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(child.pid)
    try:
        assert has_ended(pidfd, 60.0)
    finally:
        os.close(pidfd)
    found = stat_of(child.pid)
    assert found is not None
    assert found.state == "Z"
    assert Process.of(child.pid) is None
    assert not Process(child.pid, found.start_time).alive
    child.wait()
    assert stat_of(child.pid) is None
    assert list(thread_states(child.pid)) == []


def test_another_process_of_the_same_number_gets_no_signal() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        process = Process.of(sleeper.pid)
        assert process is not None
        other = Process(sleeper.pid, process.start_time - 1)
        assert not other.alive
        assert not other.signal(signal.SIGKILL)
        other.end(0.0)
        assert process.alive
        assert process.signal(signal.SIGKILL)
        assert sleeper.wait(60) == -9
    assert not process.signal(signal.SIGKILL)


def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    program = tmp_path / ") R 1 (x"
    sleep = shutil.which("sleep")
    assert sleep is not None
    program.symlink_to(sleep)
    with subprocess.Popen([program, "60"]) as sleeper:
        found = stat_of(sleeper.pid)
        mine = stat_of(os.getpid())
        assert found is not None
        assert mine is not None
        assert found.state in "RSD"
        assert found.start_time >= mine.start_time
        assert set(thread_states(sleeper.pid)) <= set("RSD")
        sleeper.kill()


def test_processor_time_includes_that_of_ended_children() -> None:
    line = b"7 (a b) S " + b" ".join(str(number).encode() for number in range(4, 53))
    ticks = os.sysconf("SC_CLK_TCK")
    assert Stat.parse(line) == Stat("S", (14 + 15 + 16 + 17) / ticks, 22)


# A process that starts the child, and is killed.
_STARTER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], pass_fds=[int(sys.argv[2])])
print(child.pid, flush=True)
sys.stdin.read()
"""
_CHILD = """
import signal, sys
from obdlab.system.processes import end_with_parent
print(end_with_parent(int(sys.argv[1])), flush=True)
signal.pause()
"""


def test_a_process_ends_with_its_parent() -> None:
    readable, writable = os.pipe()
    command = [sys.executable, "-c", _STARTER, _CHILD, str(writable)]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[writable], text=True
        ) as starter,
        open(readable, "rb") as ended,
    ):
        os.close(writable)
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert starter.stdout.readline() == "True\n"
        assert stat_of(pid) is not None
        starter.kill()
        assert ended.read() == b""  # the child held the pipe's other end until it ended


def test_a_parent_that_has_ended_already_is_noticed() -> None:
    code = f"from obdlab.system.processes import end_with_parent\nassert not end_with_parent({os.getppid()})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
