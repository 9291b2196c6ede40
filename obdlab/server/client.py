"""Attaching, detaching and listing devices, from any process.

Only an attach needs the device host, which is started on demand. Everything else works on the kernel's state and the
run directory, even when host and servers are dead.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from msgspec import structs

from obdlab.devices import kinds
from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.config import read_config
from obdlab.server import controlclient, wire
from obdlab.server.messages import (
    OF_HOST,
    Attach,
    Attached,
    Description,
    Done,
    Failed,
    GetStatistics,
    HostRequest,
    Keep,
    Kept,
    Message,
    Mounted,
    Prime,
    Primed,
    ServerStatistics,
    Stale,
    Upgrade,
    Upgraded,
)
from obdlab.server.rundir import (
    SOCKET_NAME,
    START_LOCK_NAME,
    TAKE_DOWN_SIGNAL,
    DeviceRecord,
    DeviceState,
    RunDir,
    device_id_of,
    held,
    remove_device,
)
from obdlab.system import mount
from obdlab.system.locks import lock_until
from obdlab.system.ownfiles import check_own_directory
from obdlab.system.processes import Process

if TYPE_CHECKING:
    from obdlab.image.config import ImageConfig
    from obdlab.settings.settings import Settings

T = TypeVar("T")

#: Time for Python to start and the host to listen, on a busy machine.
_HOST_START_TIMEOUT_S = 30.0
#: The host gets less time than its client has, by this share and at most this much: its answer, with the cause of a
#: failure, must still come through.
_ANSWER_SHARE = 0.2
_MOST_FOR_ANSWER_S = 10.0
_CONNECT_S = 5.0
_SHORTEST_S = 0.01
_KEEPER_S = 60.0
_HOST_END_S = 5.0


@dataclass(frozen=True, slots=True)
class AttachedDevice:
    """A device as its users see it. ``alive``: it is served, or will be in a moment; if not, reads fail.

    The process ``keeper_pid`` replaces a server that dies; 0 means no keeper. A device that has ``graduated`` is
    served by the kernel alone, from a local file, and has no processes any more.
    """

    device_id: str
    path: Path
    size: int
    read_only: bool
    pid: int
    config: Path
    kind: str
    alive: bool = True
    keeper_pid: int = 0
    restarts: int = 0
    graduated: bool = False
    state: DeviceState = DeviceState.WHOLE


class Devices(Protocol):
    """The part of a device service that a snapshotter needs; each method as DeviceService has it."""

    @property
    def settings(self) -> Settings:
        """The settings for opening images."""

    def check_place(self) -> None:
        """Raise DeviceError if the place of the devices' files cannot be used."""

    def start_host(self) -> None:
        """Start all processes that the first attach needs."""

    def prime(self, image: ImageConfig) -> None:
        """Cache the parts of an image that opening it reads from its registry; an image opens without, too."""

    def attach(self, config_path: Path, device_id: str | None = None) -> AttachedDevice:
        """Make an image a block device, or find its present one."""

    def mount(self, device: AttachedDevice, target: Path, *, options: str = "", read_only: bool = True) -> None:
        """Mount a device's file system."""

    def release(self, device_id: str) -> bool:
        """Detach a device that this mount namespace has unmounted. Return False if other users still hold it."""

    def list(self) -> list[AttachedDevice]:
        """Return the devices."""


class DeviceService:
    """The devices of one run directory. ``settings`` apply to this client's attaches."""

    def __init__(self, run_dir: Path, settings: Settings) -> None:
        self._run = RunDir(run_dir)
        self._settings = settings

    @property
    def settings(self) -> Settings:
        """The settings for opening images."""
        return self._settings

    @property
    def run_dir(self) -> RunDir:
        """The run directory of this client's devices."""
        return self._run

    def attach(self, config_path: Path, device_id: str | None = None, *, timeout_s: float = 150.0) -> AttachedDevice:
        """Make the image of a config.v1.json a block device, or find its present one.

        Attaching the same config under the same id again returns the same device. Raises ObdlabError; nothing is left
        behind then. If the image cannot be opened, it is the error of opening it, of the same class; if the id is
        taken by another config, or ``timeout_s`` has passed, a DeviceError.
        """
        config = config_path.absolute()
        digest = hashlib.sha256(read_config(config)).hexdigest()
        device_id = device_id or device_id_of(config)
        self._run.create()
        self._run.device(device_id)
        request = Attach(
            device_id=device_id,
            config=str(config),
            config_sha256=digest,
            settings=self._settings.to_json(),
            readahead_kib=self._settings.device_readahead_kib,
        )
        doing = f"cannot attach {config}: "
        return _as_device(_expected(Attached, self._ask_fresh_host(request, device_id, timeout_s), doing).device)

    def prime(self, image: ImageConfig) -> None:
        """Cache the parts of an image that opening it reads from its registry. Raises ObdlabError with the cause."""
        self._run.create()
        request = Prime(image=image.to_json(), settings=self._settings.to_json())
        answer = self._ask_host(request, time.monotonic() + self._settings.open_deadline_s)
        _expected(Primed, answer, "cannot prime the cache: ")

    def upgrade(self, device_id: str, *, force: bool = False, timeout_s: float = 150.0) -> bool:
        """Have a device in use served by the installed code. Return False if it was already.

        A device whose keeper was killed gets a new keeper. With ``force`` the server is replaced in any case, even if
        it hangs. The device's users see a pause at most. Raises ObdlabError with the cause if the new server cannot
        be started; the old one goes on then.
        """
        self._run.device(device_id)
        answer = self._ask_fresh_host(Upgrade(device_id=device_id, force=force), device_id, timeout_s)
        return _expected(Upgraded, answer, "cannot upgrade: ").upgraded

    def mount(self, device: AttachedDevice, target: Path, *, options: str = "", read_only: bool = True) -> None:
        """Mount the device's file system on the directory ``target``.

        Raises DeviceError; if the kernel could not read the device, with the cause from its server.
        """
        try:
            is_file = kinds.find(device.kind).is_file
            already = mount.mounts_of(device.path) if is_file else []
            if already:  # once the file is mounted, its server does not keep it open for others
                mount.bind(already[0].mountpoint, target, read_only=read_only)
                return
            mount.mount(device.path, target, read_only=read_only, options=options)
            if is_file:
                controlclient.ask(self._run.device(device.device_id), Mounted(), Done)
        except DeviceError as error:
            cause = self.last_error(device.device_id)
            raise DeviceError(f"{error}: {cause}" if cause else str(error)) from error

    def detach(
        self, device_id: str, *, timeout_s: float = 10.0, force: bool = False, patience_s: float = 0.0
    ) -> bool:
        """Take a device down; wait until device, mount and server are gone. Return False if there was no device.

        Waits up to ``patience_s`` for users elsewhere, such as a container that starts. Raises DeviceError, having
        changed nothing, while a file system is mounted from it, unless ``force``.
        """
        directory = self._run.device(device_id)
        if not directory.is_dir():
            return False
        deadline = time.monotonic() + timeout_s
        waits_until = time.monotonic() + patience_s
        with held(directory, timeout_s):
            while True:
                try:
                    remove_device(directory, timeout_s=_left(max(deadline, waits_until), timeout_s), force=force)
                except DeviceError:  # each try waits for TRANSIENT_USE_S
                    if time.monotonic() >= waits_until or _is_mounted_here(directory):
                        raise
                else:
                    return True

    def release(self, device_id: str) -> bool:
        """Detach a device that this mount namespace has unmounted. Return False if other users still hold it.

        A device still mounted here stays. A device held only by others (a copy of the mount in another namespace, an
        overlay) goes when they let go of it, and :meth:`list` then sweeps its directory.
        """
        try:
            self.detach(device_id)
        except DeviceError:
            self._leave_to_others(self._run.device(device_id))
            return False
        return True

    def _leave_to_others(self, directory: Path) -> None:
        if _is_mounted_here(directory):
            return
        record = DeviceRecord.load(directory)
        kind = kinds.find(record.kind if record is not None else kinds.FIRST)
        if not kind.take_down_when_unused(directory) and record is not None and record.keeper is not None:
            record.keeper.signal(TAKE_DOWN_SIGNAL)

    def list(self) -> list[AttachedDevice]:
        """Return the devices by id. Removes leftovers of dead servers, or lists them if they are still in use."""
        devices = []
        for directory in self._run.device_directories():
            record = DeviceRecord.load(directory)
            if record is None:  # an attach in progress, or its leftovers: not a device (cleanup removes them)
                continue
            if not record.alive and self._remove_dead(directory):
                continue
            devices.append(_as_device(record))
        return devices

    def statistics(self, device_id: str) -> dict[str, Any]:
        """Ask a device's server for its counters (``DeviceStatistics``, and under "source" those of the image).

        Raises DeviceError if there is no such device or its server does not answer; a graduated device has no server.
        """
        found = asdict(controlclient.ask(self._run.device(device_id), GetStatistics(), ServerStatistics))
        return {name: value for name, value in found.items() if value is not None}

    def last_error(self, device_id: str) -> str:
        """Return the cause of the device's last I/O error, or ''; never raises DeviceError.

        The kernel answers EIO without a cause.
        """
        record = DeviceRecord.load(self._run.device(device_id))
        if record is not None and record.is_graduated:
            return f"the kernel reads {record.graduated} itself"
        try:
            return str(self.statistics(device_id).get("last_error", ""))
        except ObdlabError as error:
            return str(error)

    def shutdown(self, *, force: bool = False) -> None:
        """Detach all devices and stop the host. Raises DeviceError naming the devices in use."""
        failures = []
        for directory in self._run.device_directories():
            try:
                self.detach(directory.name, force=force)
            except DeviceError as error:
                failures.append(str(error))
        self.stop_host()
        if failures:
            raise DeviceError("; ".join(failures))

    def check_place(self) -> None:
        """Make the run directory. Raises DeviceError if this fails, or if others can change it or the cache's."""
        self._run.create()
        try:  # as the cache itself does, whose modules need much memory (numpy)
            with suppress(FileNotFoundError):
                check_own_directory(self._settings.cache_dir)
        except OSError as error:
            raise DeviceError(f"cache directory {self._settings.cache_dir}: {error.strerror}") from error

    def start_host(self) -> None:
        """Have the device host run before the first attach. Raises DeviceError."""
        self._run.create()
        self._connect_to_host(time.monotonic() + _HOST_START_TIMEOUT_S).close()

    def stop_host(self, *, timeout_s: float = _HOST_END_S) -> bool:
        """Stop the device host, not the devices; kill it after ``timeout_s``. Return True if one ran."""
        try:
            known = json.loads((self._run.path / "host.pid").read_text())
            process = Process(int(known["pid"]), int(known["start_time"]))
        except (OSError, ValueError, TypeError, KeyError):
            return False
        if not process.alive:
            return False
        process.signal(signal.SIGTERM)
        process.end(timeout_s)
        return True

    def ask_for_keeper(self, device_id: str, description: Description) -> socket.socket:
        """Have a new keeper adopt this process, the server of a device. Return the connection to the keeper.

        Raises ObdlabError if no keeper comes within a minute.
        """
        request = Keep(device_id=device_id, server=description)
        deadline = time.monotonic() + _KEEPER_S
        connection = self._connect_to_host(deadline)
        try:
            _expected(Kept, _exchange(connection, request, deadline))
        except BaseException:
            connection.close()
            raise
        return connection

    def _remove_dead(self, directory: Path) -> bool:
        try:
            with held(directory, 1.0):
                record = DeviceRecord.load(directory)
                if record is not None and record.alive:  # attached again meanwhile
                    return False
                remove_device(directory)
        except DeviceError:
            return False
        return True

    def _connect_to_host(self, deadline: float) -> socket.socket:
        path = self._run.path / SOCKET_NAME
        try:
            return wire.connect(path, _left(deadline, _CONNECT_S))
        except OSError:
            self._have_host_started(deadline)
        try:
            return wire.connect(path, _left(deadline, _CONNECT_S))
        except OSError as error:
            raise DeviceError(f"{path}: the device host does not answer: {error.strerror or error}") from error

    # Clients that need a host at the same moment start one together: eight starts of Python take eight times as long,
    # which on a busy machine is longer than any client waits.
    def _have_host_started(self, deadline: float) -> None:
        try:
            lock = os.open(self._run.path / START_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeviceError(f"{self._run.path}: cannot start the device host: {error.strerror}") from error
        try:
            lock_until(lock, time.monotonic() + _left(deadline, _HOST_START_TIMEOUT_S))  # or start one all the same
            try:
                wire.connect(self._run.path / SOCKET_NAME, _left(deadline, _CONNECT_S)).close()
            except OSError:
                self._start_host(_left(deadline, _HOST_START_TIMEOUT_S))
        finally:
            os.close(lock)

    def _ask_fresh_host(self, request: HostRequest, device_id: str, timeout_s: float) -> Message:
        deadline = time.monotonic() + timeout_s
        answer = self._ask_host(request, deadline, device_id)
        if isinstance(answer, Stale):  # the package was changed since the host started; devices survive its end
            self.stop_host(timeout_s=_left(deadline, _HOST_END_S))
            answer = self._ask_host(request, deadline, device_id)
        if isinstance(answer, Stale):
            return Failed(f"device {device_id}: the installed package keeps changing")
        return answer

    # A host that dies before it answers is replaced once: repeating an attach is safe.
    def _ask_host(self, request: HostRequest, deadline: float, device_id: str = "") -> Message:
        try:
            try:
                return self._ask_host_once(request, deadline)
            except wire.ConnectionLostError:
                return self._ask_host_once(request, deadline)
        except DeviceError as error:
            what = f"device {device_id}: " if device_id else ""
            raise DeviceError(f"{what}device host: {error} (see {self._run.host_log})") from error

    def _ask_host_once(self, request: HostRequest, deadline: float) -> Message:
        with self._connect_to_host(deadline) as connection:
            return _exchange(connection, request, deadline)

    # The command returns once the host listens, detached from this process; two commands at a time are fine.
    def _start_host(self, timeout_s: float) -> None:
        command = [sys.executable, "-m", "obdlab.cli.device_host", "--run-dir", str(self._run.path), "--detach"]
        command += _log_arguments(self._settings)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"the device host did not start within {timeout_s:.3g} s") from error
        if done.returncode != 0:
            text = done.stderr.decode(errors="replace").strip()
            raise DeviceError(f"the device host did not start: {text or f'exit status {done.returncode}'}")


def _is_mounted_here(directory: Path) -> bool:
    return any(mount.mounts_of(path) for path in kinds.devices_of(directory))


# Sends the request and receives one message, by a deadline. Raises DeviceError.
def _exchange(connection: socket.socket, request: HostRequest, deadline: float) -> Message:
    left_s = _left(deadline, float("inf"))
    request = structs.replace(request, timeout_s=left_s - min(_MOST_FOR_ANSWER_S, left_s * _ANSWER_SHARE))
    connection.settimeout(left_s)
    try:
        wire.send(connection, request)
    except OSError as error:
        raise wire.ConnectionLostError(f"connection lost: {error.strerror or error}") from error
    return wire.receive(connection, _left(deadline, left_s), OF_HOST)


# Raises the error that the other side reports instead.
def _expected(kind: type[T], answer: Message, doing: str = "") -> T:
    if isinstance(answer, Failed):
        raise answer.restore(doing)
    if not isinstance(answer, kind):
        raise DeviceError(f"{doing}the device host answers {type(answer).__name__} (wanted {kind.__name__})")
    return answer


# At most ``most_s``; never 0, so that the call itself reports the timeout.
def _left(deadline: float, most_s: float) -> float:
    return max(_SHORTEST_S, min(most_s, deadline - time.monotonic()))


def _log_arguments(settings: Settings) -> list[str]:
    arguments = ["--log-format", settings.log_format, "--log-level", settings.log_level]
    arguments += ["--log-size", str(settings.log_size), "--log-count", str(settings.log_count)]
    return arguments + (["--log-file", str(settings.log_path)] if settings.log_path else [])


def _as_device(record: DeviceRecord) -> AttachedDevice:
    return AttachedDevice(
        device_id=record.device_id,
        path=Path(record.path),
        size=record.size,
        read_only=record.read_only,
        pid=record.pid,
        config=Path(record.config),
        kind=record.kind,
        alive=record.alive,
        keeper_pid=record.keeper_pid if record.is_kept else 0,
        restarts=record.restarts,
        graduated=record.is_graduated,
        state=record.state,
    )
