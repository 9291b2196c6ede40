"""FUSE connections of test processes, and their end.

A process that serves a FUSE file and reads it too can't be killed while the read waits for its own answer. Aborting
the connection ends the wait with an error (kernel: Documentation/filesystems/fuse/fuse.rst).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.system import abi

if TYPE_CHECKING:
    from collections.abc import Iterable

_NODE = "/dev/fuse"
_PROC = Path("/proc")


def connections_of(pids: Iterable[int]) -> set[int]:
    """Return the numbers of the connections that the processes hold open.

    Kernels older than 6.16 do not say which they are. There the answer is all of the host's connections if no other
    process serves any, else nothing.
    """
    pids = set(pids)
    found, unnamed = set(), False
    for pid in pids:
        for info in _descriptors(pid):
            number = _number(info)
            if number is None:
                unnamed = True
            else:
                found.add(number)
    if unnamed and not any(list(_descriptors(pid)) for pid in _all_processes() - pids):
        found |= set(_all_connections())
    return found


def abort(numbers: Iterable[int]) -> list[int]:
    """End connections: all who wait for an answer get an error. Return the numbers of those that were there."""
    aborted: list[int] = []
    numbers = sorted(numbers)
    if not numbers:
        return aborted
    root = abi.mount_detached("fusectl", {}, 0)  # not every host has it mounted
    try:
        for number in numbers:
            with suppress(OSError):  # ended meanwhile
                descriptor = os.open(f"{number}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
                try:
                    os.write(descriptor, b"1")
                    aborted.append(number)
                finally:
                    os.close(descriptor)
    finally:
        os.close(root)
    return aborted


# Of every open /dev/fuse: what the kernel says of it. The first thread of a killed process has no files any more.
def _descriptors(pid: int) -> Iterable[str]:
    for task in (_PROC / str(pid) / "task").glob("*"):
        found = []
        with suppress(OSError):
            for name in os.listdir(task / "fd"):
                with suppress(OSError):
                    if os.readlink(task / "fd" / name) == _NODE:
                        found.append((task / "fdinfo" / name).read_text())
        if found:
            return found
    return []


def _number(info: str) -> int | None:
    for line in info.splitlines():
        key, _, value = line.partition(":")
        if key == "fuse_connection":
            return int(value)
    return None


def _all_processes() -> set[int]:
    return {int(path.name) for path in _PROC.glob("[0-9]*")}


def _all_connections() -> list[int]:
    root = abi.mount_detached("fusectl", {}, 0)
    try:
        return [int(name) for name in os.listdir(root) if name.isdecimal()]
    finally:
        os.close(root)
