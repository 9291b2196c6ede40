"""Attaching, detaching and listing devices, from any process.

Only an attach needs the device host, which is started on demand. Everything else works on the kernel's state and the
run directory, even when host and servers are dead.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from obdlab.devices import kinds
from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.config import digest_of_config
from obdlab.server import controlclient
from obdlab.server.hostclient import HostClient, expected, left_s
from obdlab.server.localattach import attach_unpacked, unpacked_disk
from obdlab.server.messages import (
    Attach,
    Attached,
    Description,
    Done,
    GetStatistics,
    Keep,
    Mounted,
    Prime,
    Primed,
    ServerStatistics,
    Upgrade,
    Upgraded,
)
from obdlab.server.rundir import (
    TAKE_DOWN_SIGNAL,
    DeviceRecord,
    DeviceState,
    RunDir,
    device_id_of,
    held,
    is_there,
    remove_device,
)
from obdlab.system import mount
from obdlab.system.ownfiles import check_own_directory

if TYPE_CHECKING:
    from obdlab.image.config import ImageConfig
    from obdlab.settings.settings import Settings

T = TypeVar("T")


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

    def prime(self, image: ImageConfig, *, start: bool = False) -> None:
        """Cache the parts of an image that opening it, or its ``start``, reads; an image opens without, too."""

    def attach(self, config_path: Path, device_id: str | None = None) -> AttachedDevice:
        """Make an image a block device, or find its present one."""

    def is_unpacked(self, config_path: Path) -> bool:
        """Return True if the kernel will read an image from this host's disk: its registry is not needed."""

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
        self._host = HostClient(self._run, settings)

    @property
    def settings(self) -> Settings:
        """The settings for opening images."""
        return self._settings

    @property
    def run_dir(self) -> RunDir:
        """The run directory of this client's devices."""
        return self._run

    def attach(
        self, config_path: Path, device_id: str | None = None, *, timeout_s: float = 150.0, served: bool = False
    ) -> AttachedDevice:
        """Make the image of a config.v1.json a block device, or find its present one.

        An image that was unpacked on this host is read by the kernel alone, unless the device must be ``served``: it
        does not graduate by itself either.
        Attaching the same config under the same id again returns the same device. Raises ObdlabError; nothing is left
        behind then. If the image cannot be opened, it is the error of opening it, of the same class; if the id is
        taken by another config, or ``timeout_s`` has passed, a DeviceError.
        """
        config = config_path.absolute()
        digest = digest_of_config(config)
        settings = replace(self._settings, graduation=False, completion=False) if served else self._settings
        device_id = device_id or device_id_of(config)
        self._run.create()
        self._run.device(device_id)
        request = Attach(
            device_id=device_id,
            config=str(config),
            config_sha256=digest,
            settings=settings.to_json(),
            readahead_kib=self._settings.device_readahead_kib,
        )
        if not served:
            unpacked = attach_unpacked(self._run.device(device_id), request, self._settings, timeout_s)
            if unpacked is not None:
                return _as_device(unpacked)
        doing = f"cannot attach {config}: "
        return _as_device(expected(Attached, self._host.ask_fresh(request, device_id, timeout_s), doing).device)

    def is_unpacked(self, config_path: Path) -> bool:
        """Return True if the image is unpacked on this host: an attach needs neither device host nor registry."""
        return unpacked_disk(config_path, self._settings) is not None

    def prime(self, image: ImageConfig, *, start: bool = False) -> None:
        """Cache the parts of an image that opening it reads from its registry, or those that its ``start`` reads.

        Raises ObdlabError with the cause.
        """
        self._run.create()
        request = Prime(image=image.to_json(), settings=self._settings.to_json(), start=start)
        answer = self._host.ask(request, time.monotonic() + self._settings.open_deadline_s)
        expected(Primed, answer, "cannot prime the cache: ")

    def upgrade(self, device_id: str, *, force: bool = False, timeout_s: float = 150.0) -> bool:
        """Have a device in use served by the installed code. Return False if it was already.

        A device whose keeper was killed gets a new keeper. With ``force`` the server is replaced in any case, even if
        it hangs. The device's users see a pause at most. Raises ObdlabError with the cause if the new server cannot
        be started; the old one goes on then.
        """
        self._run.device(device_id)
        answer = self._host.ask_fresh(Upgrade(device_id=device_id, force=force), device_id, timeout_s)
        return expected(Upgraded, answer, "cannot upgrade: ").upgraded

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
                    remove_device(directory, timeout_s=left_s(max(deadline, waits_until), timeout_s), force=force)
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
            if not is_there(record, directory) and self._remove_dead(directory):
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
        self._host.stop()
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
        self._host.start()

    def stop_host(self) -> bool:
        """Stop the device host, not the devices; kill it if it does not end. Return True if one ran."""
        return self._host.stop()

    def ask_for_keeper(self, device_id: str, description: Description) -> socket.socket:
        """Have a new keeper adopt this process, the server of a device. Return the connection to the keeper.

        Raises ObdlabError if no keeper comes within a minute.
        """
        return self._host.ask_for_keeper(Keep(device_id=device_id, server=description))

    def _remove_dead(self, directory: Path) -> bool:
        try:
            with held(directory, 1.0):
                record = DeviceRecord.load(directory)
                if record is not None and is_there(record, directory):  # attached again meanwhile
                    return False
                remove_device(directory)
        except DeviceError:
            return False
        return True


def _is_mounted_here(directory: Path) -> bool:
    return any(mount.mounts_of(path) for path in kinds.devices_of(directory))


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
