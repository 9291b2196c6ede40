"""Taking down what a containerd leaves: mounts, shims, runc's state, control groups, directories."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

from obdlab.errors import ObdlabError
from obdlab.lab.testbed.ownership import DEFAULT_STATE_DIR, orphans
from obdlab.lab.testbed.process import LabError, run, wait_until
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount

_CGROUPS = Path("/sys/fs/cgroup")
_RUNC_ROOT = Path("/run/containerd/runc")


def unmount_below(directories: list[Path]) -> list[Path]:
    """Unmount everything below the directories, newest first, lazily; return what was mounted."""
    roots = [directory.resolve() for directory in directories]
    entries = [entry for entry in mount.mounts() if any(entry.mountpoint.is_relative_to(root) for root in roots)]
    for entry in reversed(entries):
        mount.unmount(entry.mountpoint, lazy=True)
    return [entry.mountpoint for entry in entries]


def remove_orphans(state_dir: Path = DEFAULT_STATE_DIR) -> list[str]:
    """Take down the containerds of killed experiments with their containers; return the containerds' names."""
    removed = []
    for path, facts in orphans(state_dir, "containerd"):
        state = state_dir / str(facts["name"])
        _kill_processes_naming(str(state))
        remove_runtime_state(state.name)
        if state.is_dir():
            with suppress(ObdlabError):
                DeviceService(state / "run", Settings()).shutdown(force=True)
        roots = [Path(root) for root in facts.get("roots", [])]
        unmount_below([state, *roots])
        for directory in (state, *roots):
            shutil.rmtree(directory, ignore_errors=True)
        path.unlink(missing_ok=True)
        removed.append(state.name)
    return removed


def remove_runtime_state(namespace: str) -> None:
    """Remove runc's state and the control groups of a containerd namespace."""
    # runc deletes containers that lost their shim. No other program removes the namespace's cgroups.
    state = _RUNC_ROOT / namespace
    for container in state.iterdir() if state.is_dir() else ():
        with suppress(LabError):
            run(["runc", "--root", state, "delete", "--force", container.name])
    shutil.rmtree(state, ignore_errors=True)
    for directory in (*_CGROUPS.glob(f"*/{namespace}"), _CGROUPS / namespace):
        for path in (*directory.glob("*/"), directory):
            with suppress(OSError):
                path.rmdir()


def _kill_processes_naming(text: str) -> None:
    # Daemons and shims have the path of this containerd's socket among their arguments.
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _processes_naming(text):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        with suppress(LabError):
            wait_until(lambda: not _processes_naming(text), "end of processes", 5.0, 0.05)


def _processes_naming(text: str) -> list[int]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            with suppress(OSError):
                if text.encode() in (directory / "cmdline").read_bytes():
                    found.append(int(directory.name))
    return found
