"""The run directory: the host's socket, and one directory per device with the device's record.

State lives in the kernel (loop devices, mounts, processes); the files here only point to it. So a killed host or
client loses nothing, and leftovers of a killed server are found by their directory.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from obdlab.devices import backingfile, fuse_loop, kinds
from obdlab.errors import DeviceError
from obdlab.records import known_fields
from obdlab.system import mount
from obdlab.system.locks import lock_until, try_lock
from obdlab.system.newfile import replace_file
from obdlab.system.ownfiles import check_own_directory
from obdlab.system.processes import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The device host's socket.
SOCKET_NAME = "host.sock"
#: The socket of the process whose forks pull images.
PULL_SOCKET_NAME = "pull.sock"
#: Number and start time of the device host's process.
HOST_PID_NAME = "host.pid"
_RECORD_LOCK_NAME, _RECORD_LOCK_S = "disk.lock", 5.0
#: Locked by the client that starts the host.
START_LOCK_NAME = "host.start.lock"
#: Has a keeper take its device down once it is unused.
TAKE_DOWN_SIGNAL = signal.SIGUSR1
#: In a snapshotter's root: the file that the snapshotter locks while it runs.
SNAPSHOTTER_LOCK = "lock"
_DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_FLUSH_TIMEOUT_S = 120.0
#: A keeper ends last, unless it was killed.
_KEEPERLESS_S = 1.0


class DeviceState(enum.StrEnum):
    """State of an attached device."""

    #: Served; a death of its server or keeper will be repaired.
    WHOLE = "whole"
    #: Served. Its keeper was killed; the server is getting another one, or the kernel is too old for keepers.
    UNKEPT = "without keeper"
    #: A server is being started; its users wait.
    RESTARTING = "restarting"
    #: The kernel serves it alone, from a local file.
    GRADUATED = "graduated"
    #: Keeper and server are dead.
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a device: enough to start a server for it at any time."""

    device_id: str
    config: str
    config_sha256: str
    #: As ``Settings.to_json`` wrote them.
    settings: str = "{}"
    readahead_kib: int = 128
    #: Digest of the code that its servers run.
    code: str = ""
    #: The local file that was to replace the server; the kernel knows whether it did. "": no file.
    graduated: str = ""
    #: Name of the device's kind (``devices.kinds``).
    kind: str = kinds.FIRST


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord(Plan):
    """Record of an attached device: written when its servers change, read by all processes."""

    path: str
    size: int
    read_only: bool
    pid: int
    start_time: int
    #: The process that replaces servers; 0: no keeper.
    keeper_pid: int = 0
    keeper_start_time: int = 0
    helpers: list[int] = field(default_factory=list)
    #: Number of servers that died.
    restarts: int = 0
    #: The server that opens the image to replace a dead one. Without it these are left out of the JSON: an earlier
    #: version, such as a snapshotter that still runs, cannot read a record with fields of later ones.
    starting_pid: int | msgspec.UnsetType = msgspec.UNSET
    starting_start_time: int | msgspec.UnsetType = msgspec.UNSET

    @property
    def process(self) -> Process:
        """The device's server."""
        return Process(self.pid, self.start_time)

    def servers(self) -> list[Process]:
        """The device's server, and the living ones among its helpers and starting servers."""
        helpers = (Process.of(pid) for pid in self.helpers)
        starting = [self.starting] if self.starting is not None else []
        return [self.process, *(each for each in helpers if each is not None), *starting]

    @property
    def keeper(self) -> Process | None:
        """The process that replaces the server when it dies."""
        return Process(self.keeper_pid, self.keeper_start_time) if self.keeper_pid else None

    @property
    def starting(self) -> Process | None:
        """The process that is about to be the server."""
        return Process(self.starting_pid, self.starting_start_time or 0) if self.starting_pid else None

    @property
    def is_kept(self) -> bool:
        """Whether the server is replaced when it dies."""
        return self.keeper is not None and self.keeper.alive

    @property
    def is_graduated(self) -> bool:
        """Whether the kernel serves it alone, from a local file: it has no processes then."""
        return bool(self.graduated) and backingfile.is_behind(self.graduated, Path(self.path))

    @property
    def alive(self) -> bool:
        """Whether it is served, or will be in a moment."""
        return self.state is not DeviceState.DEAD

    @property
    def state(self) -> DeviceState:
        """The device's state at this moment."""
        if self.process.alive:
            return DeviceState.WHOLE if self.is_kept else DeviceState.UNKEPT
        if self.is_kept or (self.starting is not None and self.starting.alive):
            return DeviceState.RESTARTING
        return DeviceState.GRADUATED if self.is_graduated else DeviceState.DEAD

    def save(self, directory: Path) -> None:
        """Write the record into a device's directory, all or nothing."""
        text = json.dumps(msgspec.to_builtins(self), indent=1) + "\n"
        replace_file(directory / "disk.json", text.encode())

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """Read a directory's record; None if it is missing or malformed."""
        try:
            return cls.from_json(json.loads((directory / "disk.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    @classmethod
    def from_json(cls, values: object) -> Self:
        """Return the record from another process. Fields of later versions are left out.

        Raises TypeError or ValueError if it is malformed.
        """
        return msgspec.convert(known_fields(cls, values), cls)


def is_there(record: DeviceRecord, directory: Path) -> bool:
    """Return True if the device at ``directory`` is served, or the kernel serves it alone.

    Of the latter the node may be another device's by now. Devices of one image share the file behind them: their
    labels differ.
    """
    state = record.state
    if state is DeviceState.GRADUATED:
        return fuse_loop.is_of(Path(record.path), directory)
    return state is not DeviceState.DEAD


@contextmanager
def record_locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a device's record, to read, change and write it as one step: server and keeper both do.

    Held for milliseconds, also while an attach or detach holds the directory; after five seconds the caller goes on
    without it. Raises FileNotFoundError if the directory is gone.
    """
    lock = os.open(directory / _RECORD_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        lock_until(lock, time.monotonic() + _RECORD_LOCK_S)
        yield
    finally:
        os.close(lock)


class RunDir:
    """Paths below one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def create(self) -> None:
        """Make the directories, readable by this user only.

        Raises DeviceError if they cannot be made, or if other users could change their content.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path = self.path.resolve()
            # Sockets and records are trusted because of their place.
            check_own_directory(self.path, follow_symlinks=False)
            self.devices.mkdir(exist_ok=True, mode=0o700)
            check_own_directory(self.devices, follow_symlinks=False)
        except OSError as error:
            where = error.filename or self.path
            raise DeviceError(f"{where}: cannot make the run directory: {error.strerror}") from error

    @property
    def devices(self) -> Path:
        """Holds one directory per device."""
        return self.path / "devices"

    @property
    def host_log(self) -> Path:
        """The log file of the host and all servers."""
        return self.path / "host.log"

    def device(self, device_id: str) -> Path:
        """Return the directory of a device. Raises DeviceError if the id is not a plain name."""
        if not _DEVICE_ID.fullmatch(device_id):
            raise DeviceError(f"device id: letters, digits, '_', '.' and '-' only, 128 at most (got {device_id!r})")
        return self.devices / device_id

    def device_directories(self) -> list[Path]:
        """Return the directories of all devices, including unfinished and abandoned ones."""
        try:
            return sorted(entry for entry in self.devices.iterdir() if _DEVICE_ID.fullmatch(entry.name))
        except FileNotFoundError:
            return []


def host_process(run_dir: Path) -> Process | None:
    """Return the process of the device host that runs now, or None."""
    try:
        known = json.loads((run_dir / HOST_PID_NAME).read_text())
        process = Process(int(known["pid"]), int(known["start_time"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return process if process.alive else None


def device_id_of(config: Path) -> str:
    """Return the id of a device attached without one: the same for the same config file."""
    return hashlib.sha256(os.fsencode(config.resolve())).hexdigest()[:16]


def running_snapshotter(config: Path) -> Path | None:
    """Return the root of the running snapshotter that made this device's configuration, or None.

    Its configurations are ``<root>/snapshots/<id>/block/config.v1.json``.
    """
    if len(config.parents) < 4 or (config.parent.name, config.parents[2].name) != ("block", "snapshots"):
        return None
    root = config.parents[3]
    try:
        descriptor = os.open(root / SNAPSHOTTER_LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return None if try_lock(descriptor, shared=True) else root
    except OSError:  # a file system without locks: another process cannot be excluded
        return root
    finally:
        os.close(descriptor)


@contextmanager
def held(directory: Path, timeout_s: float) -> Iterator[int]:
    """Make the device's directory if needed and keep every other attach or detach out; yields the lock's descriptor.

    The lock is on the directory itself and goes with it: a process that waited for a removed directory starts over.
    Raises DeviceError after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:  # exist_ok would check again, and fail if the directory was removed in between
            pass
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if not lock_until(lock, deadline):
                raise DeviceError(f"device {directory.name}: another attach or detach of it is still going on")
            if _is_still(lock, directory):
                yield lock
                return
        finally:
            os.close(lock)


def _is_still(lock: int, directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(directory))
    except FileNotFoundError:
        return False


def remove_device(directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
    """Take down in order: the device, its server, its directory. The caller holds the device's lock.

    Works the same whether the server runs, hangs or was killed. Raises DeviceError, having changed nothing, while a
    file system is mounted from the device, unless ``force``.
    """
    record = DeviceRecord.load(directory)
    kinds.take_down(directory, timeout_s=timeout_s, force=force)
    if record is not None:
        patience_s = _patience_s(record, timeout_s, force)
        if record.keeper is not None:
            record.keeper.end(patience_s)  # after its servers
            record = DeviceRecord.load(directory) or record  # the last server may have been replaced since
            patience_s = min(patience_s, _KEEPERLESS_S)
        for process in record.servers():
            process.end(patience_s)
    shutil.rmtree(directory, ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Take down what is left of a dead device, for another one at ``directory``. The caller holds the device's lock.

    Raises DeviceError, saying what to do, while a file system is mounted from it.
    """
    record = DeviceRecord.load(directory)
    try:
        kinds.take_down(directory)
    except DeviceError as error:
        text = f"device {directory.name}: its server is dead, but {error}{_way_out(directory)}"
        raise DeviceError(text) from error
    if record is not None:
        for process in record.servers():
            process.end(2.0)
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


# A dead file system answers with I/O errors until it is unmounted. Only its users know when they can do without it.
def _way_out(directory: Path) -> str:
    mounts = [entry for device in kinds.devices_of(directory) for entry in mount.mounts_of(device)]
    if not mounts:
        return ""
    targets = dict.fromkeys(shlex.quote(str(entry.mountpoint)) for entry in mounts)
    return f"; run: umount {' '.join(targets)} and attach again"


# With force the device may have vanished under its users, and then its server never notices the end. Otherwise a
# server of a writable device may have much data to flush before it ends.
def _patience_s(record: DeviceRecord, timeout_s: float, force: bool) -> float:
    if force:
        return min(timeout_s, 2.0)
    return timeout_s if record.read_only else max(timeout_s, _FLUSH_TIMEOUT_S)
