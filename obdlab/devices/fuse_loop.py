"""A block device without kernel modules: one file over FUSE, and a loop device on top."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import fuse, loop
from obdlab.devices.device import Device, check_sectors
from obdlab.devices.fuse import MAX_THREADS, DeviceStatistics, FuseServer
from obdlab.devices.kind import Kind, Place, cannot_open
from obdlab.devices.kinds import FIRST
from obdlab.devices.usage import wait_unused
from obdlab.errors import DeviceError
from obdlab.system import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob

_END_S = 5.0
_LABEL = "obdlab:"
#: A prefix that lookups by the label above do not match: this device goes with the one on top.
_BELOW = "obdlab-below:"


class FuseLoopDevice(Device):
    """Serves ``blob`` as a loop device. ``directory`` is the device's own: other processes find the device by it.

    With a ``connection`` (``fuse.open_connection``) that other processes hold too, the device outlives this process:
    another process given its ``path`` and the connection goes on serving it. ``on_busy``: see FuseServer. With
    ``exchangeable`` the kernel may go on without this server while a file system is mounted, see
    ``obdlab.devices.backingfile``; a read-only device then gets a second loop device below it. Raises DeviceError,
    leaving nothing behind, if the blob's size is not a multiple of the sector size or the kernel refuses.
    """

    kind = FIRST
    can_graduate = True

    def __init__(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str = "",
        read_only: bool = False,
        sector_size: int = abi.SECTOR,
        readahead_kib: int = 128,
        max_threads: int = MAX_THREADS,
        connection: int | None = None,
        path: Path | None = None,
        on_busy: Callable[[], None] | None = None,
        exchangeable: bool = False,
    ) -> None:
        check_sectors(blob, sector_size)
        self._directory = directory
        self._blob = blob
        self._server = FuseServer(blob, name=name, read_only=read_only, max_threads=max_threads, on_busy=on_busy)
        if path is not None:
            assert connection is not None
            loop.check_size(path, blob.size, blob.name)
            self._path = path
            self._server.join(connection)
            return
        with ExitStack() as failed, ExitStack() as opened:
            root = self._server.start(connection)
            failed.callback(self._server.wait, _END_S)  # it ends with the descriptors below
            opened.callback(os.close, root)
            disk = self._server.open_disk(root)
            opened.callback(os.close, disk)
            if exchangeable and self._server.read_only:
                _, disk = loop.attach_while_open(disk, label=label_below(directory), sector_size=sector_size)
                opened.callback(os.close, disk)
            self._path = loop.attach(
                disk,
                label=_label(directory),
                read_only=self._server.read_only,
                sector_size=sector_size,
                readahead_kib=readahead_kib,
            )
            failed.pop_all()

    @property
    def path(self) -> Path:
        return self._path

    @property
    def size(self) -> int:
        return self._blob.size

    @property
    def read_only(self) -> bool:
        return self._server.read_only

    @property
    def in_use(self) -> bool:
        return loop.in_use(self._path)

    @property
    def can_change_servers(self) -> bool:
        """Whether another process can go on with the requests that this one leaves unanswered (Linux 6.9)."""
        return self._server.can_send_again

    def take_on_size(self) -> None:
        self._server.forget_size()
        loop.update_size(self._path)

    def statistics(self) -> DeviceStatistics:
        return self._server.statistics()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._server.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        take_down(self._directory, timeout_s=timeout_s)
        if not self._server.wait(timeout_s):
            raise DeviceError(f"{self._path}: requests are still being served {timeout_s:g} s after it was detached")


def devices_of(directory: Path) -> list[Path]:
    """Return the loop devices that belong to a device's directory: one, plus leftovers of killed servers."""
    return loop.labelled(_label(directory))


def is_of(device: Path, directory: Path) -> bool:
    """Return True if the loop device belongs to a device's directory."""
    return loop.label_of(device) == _label(directory)


def attach_file(file: int, directory: Path, *, readahead_kib: int = 128) -> Path:
    """Make an open file the read-only device at ``directory``, without a server; return its node.

    The other functions find it and take it down as a served one. Raises DeviceError.
    """
    return loop.attach(file, label=_label(directory), read_only=True, readahead_kib=readahead_kib)


def directories_below(parent: Path) -> set[Path]:
    """Return the directories below ``parent`` that have devices, including deleted directories."""
    found = set()
    for device in loop.labelled(_LABEL):
        label = loop.label_of(device)
        directory = parent / label.rpartition(":")[2]
        if _label(directory) == label:
            found.add(directory)
    return found


def take_down(directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
    """Detach the loop devices of ``directory``; their servers end with them. A missing device is fine.

    Raises DeviceError naming the loop device while a file system is mounted from it, unless ``force``: then the
    device disappears under its users, which get I/O errors, and goes for good with the last of them.
    """
    for device in devices_of(directory):
        if not force:
            wait_unused(device)
        try:
            loop.detach(device, label=_label(directory), timeout_s=min(timeout_s, 1.0) if force else timeout_s)
        except DeviceError:
            if not force:
                raise


def take_down_when_unused(directory: Path) -> None:
    """Have the devices of ``directory``, and their servers, end with their last users."""
    for device in devices_of(directory):
        loop.detach_when_unused(device, label=_label(directory))


def label_below(directory: Path) -> str:
    """Return the label of the loop device between the served file and the device, if the device has one."""
    return f"{_BELOW}{_label(directory).removeprefix(_LABEL)}"[:63]


# Loop devices keep 63 bytes of a label; the hash distinguishes longer run directories and ids.
def _label(directory: Path) -> str:
    whole = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
    return f"{_LABEL}{whole}:{directory.name}"[:63]


class FuseLoop(Kind):
    """A file over FUSE and a loop device on it: on every kernel; devices outlive servers from Linux 6.9 on."""

    name = FuseLoopDevice.kind
    fix = "modprobe -a fuse loop"
    is_shared = True
    nodes: tuple[str, ...] = ("/dev/fuse", "/dev/loop-control")

    def missing(self) -> str:
        return next(filter(None, map(cannot_open, map(Path, self.nodes))), "")

    def open(self, blob: Blob, place: Place) -> Device:
        return FuseLoopDevice(
            blob,
            place.directory,
            name=place.name,
            readahead_kib=place.readahead_kib,
            connection=place.connection,
            path=place.path,
            on_busy=place.on_busy,
            exchangeable=place.exchangeable,
        )

    def connect(self) -> int:
        return fuse.open_connection()

    def has_ended(self, directory: Path, connection: int) -> bool:
        return fuse.has_ended(connection)

    def send_again(self, connection: int) -> None:
        fuse.send_again(connection)

    def can_change_servers(self) -> bool:
        return fuse.can_send_again()

    def devices_of(self, directory: Path) -> list[Path]:
        return devices_of(directory)

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        take_down(directory, timeout_s=timeout_s, force=force)

    def take_down_when_unused(self, directory: Path) -> bool:
        take_down_when_unused(directory)
        return True

    def directories_below(self, parent: Path) -> set[Path]:
        return directories_below(parent)


KIND = FuseLoop()
