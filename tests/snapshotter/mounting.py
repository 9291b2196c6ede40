"""Making the mounts a snapshotter tells of, as containerd's client does."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.system import abi

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.snapshotter.mounts import Mount

_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 32, 4096, 16384


@contextmanager
def mounted(mounts: Sequence[Mount], target: Path) -> Iterator[Path]:
    """Mount the one mount of a snapshot on ``target``, made if need be, and unmount it at the end."""
    (mount,) = mounts
    target.mkdir(exist_ok=True)
    if mount.type == "bind":
        assert "rbind" in mount.options
        abi.mount(mount.source, target, "", _MS_BIND | _MS_REC, "")
        if "ro" in mount.options:
            abi.mount(mount.source, target, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY, "")
    else:
        _overlay(mount, target)
    try:
        yield target
    finally:
        abi.umount2(target)


def _overlay(mount: Mount, target: Path) -> None:
    # All options must fit a page; lowers relative to the working directory are containerd's way to make many fit.
    lowers = next(option for option in mount.options if option.startswith("lowerdir=")).partition("=")[2].split(":")
    if len(lowers) == 1:
        abi.mount("overlay", target, "overlay", 0, ",".join(mount.options))
        return
    common = os.path.commonpath(lowers)
    relative = ":".join(os.path.relpath(lower, common) for lower in lowers)
    options = [option for option in mount.options if not option.startswith("lowerdir=")]
    before = os.getcwd()
    os.chdir(common)
    try:
        abi.mount("overlay", target, "overlay", 0, ",".join([*options, f"lowerdir={relative}"]))
    finally:
        os.chdir(before)
