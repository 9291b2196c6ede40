"""The processes of a run, found by what they carry: a variable in the environment, or a path of the run's."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

#: Every process that a run starts inherits it. The value is a path, so that a part of a run is below the run.
VARIABLE = "OBDLAB_TEST_RUN"
_PROC = Path("/proc")
_PAUSE_S = 0.05
_TRACKER = b"from multiprocessing.resource_tracker import main"
_MOST_SHOWN = 110


@dataclass(frozen=True, slots=True)
class Territory:
    """A run, or one worker of it: the value of VARIABLE in its processes, and the directories that are its own."""

    marker: str
    directories: tuple[Path, ...]

    def owns(self, process: Path) -> bool:
        """Return True if the process (its directory in /proc) was started by the run, or works in its directories."""
        variable = f"{VARIABLE}={self.marker}"
        for entry in _read(process / "environ").split(b"\0"):
            if entry == variable.encode() or entry.startswith(f"{variable}/".encode()):
                return True
        # Servers with an environment of their own (a registry) have their configuration in the run's directories.
        command = _read(process / "cmdline")
        return any(os.fsencode(f"{path}/") in command or self._works_in(process, path) for path in self.directories)

    def _works_in(self, process: Path, path: Path) -> bool:
        try:
            return (process / "cwd").readlink().is_relative_to(path)
        except OSError:
            return False


def members(territory: Territory, spared: Collection[int] = ()) -> set[int]:
    """Return the running processes of a territory with all their descendants, but for this process and ``spared``."""
    parents, found = {}, set()
    for directory in _PROC.glob("[0-9]*"):
        pid = int(directory.name)
        state = _state(pid)
        if state is None or state[0] in "ZX":
            continue
        parents[pid] = state[1]
        if territory.owns(directory):
            found.add(pid)
    return _with_descendants(found - {os.getpid(), *spared}, parents) - {os.getpid(), *spared}


def descendants() -> set[int]:
    """Return the running processes below this one."""
    states = {int(path.name): _state(int(path.name)) for path in _PROC.glob("[0-9]*")}
    return _with_descendants({os.getpid()}, {pid: state[1] for pid, state in states.items() if state}) - {os.getpid()}


def resource_trackers() -> set[int]:
    """Return the children of this process that are multiprocessing's resource trackers; they end after it."""
    found = set()
    for directory in _PROC.glob("[0-9]*"):
        state = _state(int(directory.name))
        if state is not None and state[1] == os.getpid() and _TRACKER in _read(directory / "cmdline"):
            found.add(int(directory.name))
    return found


def _with_descendants(found: set[int], parents: dict[int, int]) -> set[int]:
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found = found | more
    return found


def describe(pid: int) -> str:
    """Return one line on a process: its number, state, where it waits in the kernel, and its command."""
    state = _state(pid)
    if state is None:
        return f"{pid} (gone)"
    command = _read(_PROC / str(pid) / "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    waits = _read(_PROC / str(pid) / "wchan").decode(errors="replace")
    return f"{pid} {state[0]} {waits if waits.strip('0') else '-'} {command[:_MOST_SHOWN]}"


def kill_all(find: Callable[[], set[int]], timeout_s: float, stuck: Callable[[set[int]], object]) -> set[int]:
    """Kill what ``find`` returns until it returns nothing; return those that are left after ``timeout_s``.

    ``stuck`` is called, with those that are left, for what keeps killed processes in the kernel.
    """
    deadline = time.monotonic() + timeout_s
    while pids := find():
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        _wait(pids, deadline)
        if left := {pid for pid in pids if is_running(pid)}:
            stuck(left)
        if time.monotonic() > deadline:
            return left
    return set()


def _wait(pids: set[int], deadline: float) -> None:
    end = min(deadline, time.monotonic() + 1.0)
    while time.monotonic() < end and any(is_running(pid) for pid in pids):
        time.sleep(_PAUSE_S)


def is_running(pid: int) -> bool:
    """Return True if the process has a thread that is not dead; a zombie that nobody reaped is not running."""
    # A killed process whose threads are in the kernel still has a first thread that is a zombie.
    state = _state(pid)
    return state is not None and (state[0] not in "ZX" or len(_threads(pid)) > 1)


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(_PROC / str(pid) / "task")
    except OSError:
        return []


# State and parent, of /proc/PID/stat. The name in it may hold anything, parentheses included.
def _state(pid: int) -> tuple[str, int] | None:
    fields = _read(_PROC / str(pid) / "stat").rpartition(b") ")[2].split()
    return (fields[0].decode(), int(fields[1])) if len(fields) > 1 else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
