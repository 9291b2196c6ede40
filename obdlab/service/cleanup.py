"""Taking everything of a run directory down, whatever state a crash left it in."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.devices import mount
from obdlab.devices.fuse_loop import devices_of, directories_below
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.service.client import DeviceService


@dataclass(slots=True)
class Cleaned:
    """What was taken down, and what was left because somebody uses it. Lines for people."""

    removed: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)


def clean_up(service: DeviceService, *, force: bool = False) -> Cleaned:
    """Unmount what is on this run directory's devices, detach them, stop the host, empty the directory.

    Works whether host and servers run, hang, or were killed; a second run finds nothing to do. What is in use is
    left as it is and reported, unless ``force``: then mounts are detached lazily and their users get I/O errors.
    """
    report = Cleaned()
    run = service.run_dir
    for directory in sorted({*run.device_directories(), *directories_below(run.devices.resolve())}):
        try:
            directory.mkdir(parents=True, exist_ok=True)  # somebody may have removed it from under its device
            for entry in _mounts_on(directory):
                _unmount(entry.mountpoint, report, force)
            if service.detach(directory.name, force=force):
                report.removed.append(f"device {directory.name}")
        except DeviceError as error:
            report.in_use.append(str(error))
    if service.stop_host():
        report.removed.append("device host")
    if not report.in_use:
        _empty(run.path)
    return report


# Newest first, so that what is mounted inside another mount goes before it.
def _mounts_on(directory: Path) -> list[mount.MountEntry]:
    found = [entry for device in devices_of(directory) for entry in mount.mounts_of(device)]
    return sorted(found, key=lambda entry: entry.mount_id, reverse=True)


# An overlay keeps its lower file system without needing its mount: unmounting would succeed and only hide the use.
def _unmount(target: Path, report: Cleaned, force: bool) -> None:
    users = mount.holders(target)
    if users and not force:
        raise DeviceError(f"{target}: in use by {'; '.join(users)}")
    if mount.unmount(target, lazy=force):
        report.removed.append(f"mount {target}")


def _empty(run_path: Path) -> None:
    if not run_path.is_dir():
        return
    for entry in run_path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
