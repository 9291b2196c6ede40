"""Other processes: their state and start, signals to exactly one of them, waiting for its end."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from obdlab.errors import DeviceError
from obdlab.system import abi

if TYPE_CHECKING:
    from collections.abc import Iterator

_KILLED_S = 5.0


class Stat(NamedTuple):
    """The part of a line of /proc/PID/stat (proc_pid_stat(5)) that this package uses."""

    #: "R" runs, "D" waits for the kernel, "Z" has ended ...
    state: str
    #: Processor time of the process and of its ended children, in seconds.
    cpu_s: float
    #: Start, in clock ticks since boot.
    start_time: int

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Parse a line. The name before the fields may hold any characters, blanks and parentheses included."""
        fields = text.rpartition(b") ")[2].split()
        ticks = sum(int(each) for each in fields[11:15])
        return cls(fields[0].decode(), ticks / os.sysconf("SC_CLK_TCK"), int(fields[19]))


def stat_of(pid: int) -> Stat | None:
    """Return the kernel's line about a process, also a zombie; None if there is no such process."""
    try:
        return Stat.parse(Path(f"/proc/{pid}/stat").read_bytes())
    except OSError:
        return None


def thread_states(pid: int) -> Iterator[str]:
    """Yield the state of each thread of a process; nothing if it is gone."""
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            yield Stat.parse(task.read_bytes()).state
        except OSError:  # ended meanwhile
            continue


def children_of(pid: int) -> list[int]:
    """Return the numbers of a process's children, those of all its threads; none if it is gone."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            found += [int(child) for child in task.read_text().split()]
    return found


@dataclass(frozen=True, slots=True)
class Process:
    """A process; its start time (clock ticks since boot) distinguishes it from later ones with the same number."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the running process ``pid``, or None; a zombie is not running."""
        found = stat_of(pid)
        return None if found is None or found.state in ("Z", "X") else cls(pid, found.start_time)

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return Process.of(self.pid) == self

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal to this very process. Return False if it is gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self._is_there():
                return False
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def end(self, timeout_s: float) -> None:
        """Wait for the process to end by itself; after ``timeout_s`` kill it. Raises DeviceError if it survives."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except OSError:  # gone
            return
        try:
            # Not "alive": threads of a killed process may outlive its first one, which is a zombie then.
            if not self._is_there() or has_ended(pidfd, timeout_s):
                return
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not has_ended(pidfd, _KILLED_S):
                raise DeviceError(f"process {self.pid}: still there {_KILLED_S:g} s after SIGKILL")
        except ProcessLookupError:
            return
        finally:
            os.close(pidfd)

    def _is_there(self) -> bool:
        found = stat_of(self.pid)
        return found is not None and found.start_time == self.start_time


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Have the kernel send this process a signal when the process ``parent``, which started it, ends.

    Return False if that has ended already: no signal comes then. The thread that started this process counts as its
    parent, so it must live as long as that does (prctl(2)).
    """
    abi.prctl(abi.PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


def has_ended(pidfd: int, timeout_s: float) -> bool:
    """Wait for a process's end. Return False after ``timeout_s``."""
    # Not by select, which fails on descriptors from 1024 on: a snapshotter has one for each of its images.
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
