"""Taking down what a run, or one worker of it, left: processes, mounts, devices, networks, containers, files."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.guard import fuse, processes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from tests.guard.processes import Territory

_PROCESSES_S = 20.0
_RUNC = Path("/run/containerd/runc")
_CGROUPS = Path("/sys/fs/cgroup")
_SHIM = "containerd-shim"


def take_down(territory: Territory, spared: Collection[int] = ()) -> list[str]:
    """Remove everything of a territory but its directories; return a line for each thing that was there."""
    found: dict[int, str] = {}
    shims: list[str] = []
    groups: set[Path] = set()

    def find() -> set[int]:
        pids = processes.members(territory, spared)
        for pid in pids - set(found):
            found[pid] = processes.describe(pid)
            shims.extend(_container_of(pid))
            groups.update(_groups_of(pid))
        return pids

    left = processes.kill_all(find, _PROCESSES_S, lambda pids: fuse.abort(fuse.connections_of(pids)))
    lines = [f"process {line}" for line in found.values()]
    lines += [f"process {pid} cannot be killed" for pid in left]
    lines += [f"mount {target}" for target in _unmount_below(territory.directories)]
    lines += _devices_below(territory.directories)
    _forget_containers(shims, groups - set(_groups_of(os.getpid())))
    return lines


def remove(directories: Iterable[Path]) -> list[str]:
    """Delete directories; return a line for each that is left, because something is still mounted in it."""
    lines = []
    for directory in directories:
        if mounted := _mounts_below([directory]):
            lines.append(f"directory {directory} (mounted: {mounted[0]})")
            continue
        shutil.rmtree(directory, ignore_errors=True)
        if directory.exists():
            lines.append(f"directory {directory}")
    return lines


def _mounts_below(directories: Iterable[Path]) -> list[Path]:
    from obdlab.system import mount

    tops = tuple(directories)
    return [entry.mountpoint for entry in mount.mounts() if any(entry.mountpoint.is_relative_to(top) for top in tops)]


def _unmount_below(directories: Iterable[Path]) -> list[Path]:
    from obdlab.system import mount

    targets = _mounts_below(directories)[::-1]  # those in others first
    for target in targets:
        with suppress(Exception):  # the next one is tried; what is left is reported with its directory
            mount.unmount(target, lazy=True)
    return targets


# The devices of killed servers stay attached. What they were is known to the product, by their directories.
def _devices_below(directories: Iterable[Path]) -> list[str]:
    from obdlab.devices import loop
    from obdlab.errors import ObdlabError

    lines = []
    tops = tuple(directories)
    for node in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with suppress(OSError):
            device = Path("/dev") / node.parts[3]
            if Path(node.read_text().strip()).is_relative_to("/") and any(
                node.read_text().startswith(f"{top}/") for top in tops
            ):
                loop.detach(device, label=loop.label_of(device), timeout_s=1.0)
                lines.append(f"device {device}")
    search = bool(loop.labelled("obdlab"))
    for directory in (Path(name) for top in tops for name, _, _ in os.walk(top)):
        with suppress(ObdlabError, OSError):
            if search:
                lines += _kernel_devices_of(directory)
            if any(directory.glob("network-*.json")) or any(directory.glob("containerd-*.json")):
                lines += _experiments_in(directory)
    return lines


# Imports here, not above: most runs leave nothing, and these take half a second.
def _kernel_devices_of(directory: Path) -> list[str]:
    from obdlab.devices import fuse_loop, kinds

    lines = []
    for owner in kinds.directories_below(directory):
        fuse_loop.take_down(owner, force=True, timeout_s=1.0)
        lines.append(f"device of {owner}")
    return lines


def _experiments_in(directory: Path) -> list[str]:
    from obdlab.lab.testbed.leftovers import cleanup_leftovers

    return [f"experiment's {name}" for name in cleanup_leftovers(directory)]


def _container_of(pid: int) -> list[str]:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    if _SHIM not in words[0] or "-namespace" not in words or "-id" not in words:
        return []
    return [f"{words[words.index('-namespace') + 1]}/{words[words.index('-id') + 1]}"]


def _groups_of(pid: int) -> list[Path]:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for name in (controllers, controllers.removeprefix("name="), "unified", ""):
            group = _CGROUPS / name / path.lstrip("/")
            if path != "/" and group.is_dir():
                found.append(group)
    return found


# Killed shims leave the state of their containers, killed containers their control groups.
def _forget_containers(shims: list[str], groups: set[Path]) -> None:
    for name in shims:
        shutil.rmtree(_RUNC / name, ignore_errors=True)
        with suppress(OSError):
            (_RUNC / name).parent.rmdir()
    for group in groups:
        for path in (group, group.parent):
            if path.parent != _CGROUPS and path != _CGROUPS:
                with suppress(OSError):  # others are in it
                    path.rmdir()
