"""Takes down everything of a run directory, in any state that a crash left it in."""

from __future__ import annotations

import shutil
import socket
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cache.space import CacheSpace
from obdlab.cache.unpacked import remove_unused
from obdlab.devices.kinds import devices_of, directories_below
from obdlab.errors import DeviceError
from obdlab.server import snapshottersocket, wire
from obdlab.server.capture.directories import end_start, maker_of, places_of_starts
from obdlab.server.counterfiles import TALLY_LOCK_NAME, TALLY_NAME
from obdlab.server.rundir import (
    HOST_PID_NAME,
    SOCKET_NAME,
    START_LOCK_NAME,
    DeviceRecord,
    held,
    running_snapshotter,
)
from obdlab.server.snapshotaccess import API_SOCKET_NAME, TOKEN_NAME
from obdlab.system import mount

if TYPE_CHECKING:
    from obdlab.server.client import DeviceService

#: Files that obdlab makes in a run directory.
_FILES = (
    TOKEN_NAME,
    API_SOCKET_NAME,
    SOCKET_NAME,
    f"{SOCKET_NAME}.new",
    HOST_PID_NAME,
    "host.lock",
    START_LOCK_NAME,
    "host.log",
    TALLY_NAME,
    TALLY_LOCK_NAME,
)
_DIRECTORIES = ("devices", "images")
_PROBE_TIMEOUT_S = 2.0
_ATTACH_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Cleaned:
    """Descriptions of removed things, and of those left because they are in use. Lines for people."""

    removed: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)


def clean_up(service: DeviceService, *, force: bool = False) -> Cleaned:
    """Unmount the file systems on this run directory's devices, detach them, stop the host, empty the directory.

    Works whether host and servers run, hang, or were killed; a second run finds nothing to do. Devices in use are
    left as they are and reported. So are the devices and mounts of a running snapshotter, which relies on them even
    while no container does. With ``force`` they go: mounts are detached lazily and their users get I/O errors, and
    starts that are being recorded or watched are ended. The snapshotter itself is always left, and so are files that
    are not obdlab's.
    """
    report = Cleaned()
    run = service.run_dir
    running = _end_starts(run.path, report, force)
    kept: dict[Path, int] = {}
    for directory in sorted({*run.device_directories(), *directories_below(run.devices.resolve())}):
        if directory.name.partition(".")[0] in running:
            continue
        try:
            root = None if force else _snapshotter_of(directory)
            if root is not None:
                kept[root] = kept.get(root, 0) + 1
                continue
            directory.mkdir(parents=True, exist_ok=True)  # it may have been removed from under its device
            for entry in _mounts_on(directory):
                _unmount(entry.mountpoint, report, force)
            if service.detach(directory.name, force=force):
                report.removed.append(f"device {directory.name}")
        except DeviceError as error:
            report.in_use.append(str(error))
    report.in_use += [_kept_text(root, count) for root, count in kept.items()]
    live = _live_sockets(run.path)
    if (force or not (kept or live)) and service.stop_host():
        report.removed.append("device host")
    report.in_use += live
    if not report.in_use:
        _empty(run.path)
    _remove_half_made(service, report)
    return report


# A killed unpacker leaves a file of no use: the next unpacker begins again.
def _remove_half_made(service: DeviceService, report: Cleaned) -> None:
    space = CacheSpace(service.settings.cache_dir)
    try:
        freed = remove_unused(space, half_made_only=True)
    except OSError as error:
        report.in_use.append(f"{space.directory}: half-made unpacked images stay: {error.strerror}")
        return
    if freed:
        report.removed.append(f"half-made unpacked images ({freed >> 20} MiB)")


# Only a start's maker can end its containers and mounts: they are in its mount namespace. Returns the starts that go
# on.
def _end_starts(run_path: Path, report: Cleaned, force: bool) -> set[str]:
    running = set()
    for place in places_of_starts(run_path):
        maker = maker_of(place)
        if maker is None:
            continue
        try:
            if force:
                end_start(place, maker)
                report.removed.append(f"{_kind_of(place)} {place.name} (pid {maker.pid})")
                continue
            report.in_use.append(f"{place.name}: a {_kind_of(place)} goes on (pid {maker.pid}; SIGINT ends it)")
        except DeviceError as error:
            report.in_use.append(f"{place.name}: {error}")
        running.add(place.name)
    return running


def _kind_of(place: Path) -> str:
    return "build" if place.name.startswith("build-") else "start"


def _snapshotter_of(directory: Path) -> Path | None:
    record = DeviceRecord.load(directory)
    if record is None and directory.is_dir():  # wait for an attach under way: only its record names its owner
        with held(directory, _ATTACH_TIMEOUT_S):
            record = DeviceRecord.load(directory)
    return None if record is None else running_snapshotter(Path(record.config))


def _kept_text(root: Path, count: int) -> str:
    devices = "device" if count == 1 else "devices"
    return f"{count} {devices} and what is mounted from there: of the snapshotter that runs with --root {root}"


# Newest first, so that a mount inside another mount goes before it.
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


# Except for the host's, a socket in the run directory belongs to a service that was started to listen there.
def _live_sockets(run_path: Path) -> list[str]:
    listeners = {path: _listener(path) for path in _sockets(run_path) if path.name != SOCKET_NAME}
    return [f"{_service_of(path)} is still running on {path} ({who})" for path, who in listeners.items() if who]


def _service_of(path: Path) -> str:
    return "a snapshot-api" if path.name == API_SOCKET_NAME else "a snapshotter"


def _listener(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return ""
        except OSError as error:  # perhaps too busy to answer: not known to be dead
            return f"pid unknown: {error}"
        return f"pid {wire.peer_of(probe).pid}"


def _sockets(run_path: Path) -> list[Path]:
    if not run_path.is_dir():
        return []
    return [entry for entry in sorted(run_path.iterdir()) if stat.S_ISSOCK(entry.lstat().st_mode)]


# Removes only obdlab's own files: people put other things beside them. No socket has a listener any more here.
def _empty(run_path: Path) -> None:
    logs = list(run_path.glob("host.log.[0-9]*"))  # rotated
    for path in [run_path / name for name in _FILES] + logs + _sockets(run_path):
        path.unlink(missing_ok=True)
    for name in _DIRECTORIES:
        shutil.rmtree(run_path / name, ignore_errors=True)
    for path in places_of_starts(run_path):
        if not _has_mounts(path):
            shutil.rmtree(path, ignore_errors=True)
    _empty_of_dead(snapshottersocket.directory_of(run_path))


def _has_mounts(path: Path) -> bool:
    resolved = path.resolve()
    return any(resolved == entry.mountpoint or resolved in entry.mountpoint.parents for entry in mount.mounts())


# Snapshotters that listen for containerd elsewhere may still serve their counters here.
def _empty_of_dead(directory: Path) -> None:
    for path in _sockets(directory):
        if not _listener(path):
            path.unlink(missing_ok=True)
    try:
        directory.rmdir()
    except OSError:  # not there, or not empty
        pass
