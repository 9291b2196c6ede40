"""The registry of block device kinds: which kinds this host has; making, finding and ending devices of each.

Besides the device itself, kinds differ in how a device outlives the process that serves it. Other processes hold the
connection of a FUSE file too and hand it on. A TCMU or ublk device stays in the kernel without a server, and the next
server finds it by its directory.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import loop
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

AUTOMATIC = "auto"
#: Stands for the connection of kinds without connections.
NO_CONNECTION = -1
_UBLK_CONTROL = Path("/dev/ublk-control")
_CONFIGFS_TARGET = Path("/sys/kernel/config/target")


class Kind(ABC):
    """One kind of block device. ``directory`` is always the device's own; every process finds the device by it."""

    name: str
    #: How to give such devices to a host that lacks them.
    fix: str
    #: Whether several processes can serve a device at a time.
    is_shared = False

    @abstractmethod
    def missing(self) -> str:
        """Return the reason why this host cannot have such devices, or ''."""

    @abstractmethod
    def make(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str,
        readahead_kib: int,
        connection: int,
        path: Path | None,
        on_busy: Callable[[], None] | None,
    ) -> Device:
        """Serve ``blob`` from this process as a new device, or as the one at ``path`` whose server is gone.

        Raises DeviceError.
        """

    def connect(self) -> int:
        """Return the descriptor that a device's servers hand on to each other, or NO_CONNECTION. Raises DeviceError.

        The caller passes it back to ``make`` and the other methods.
        """
        return NO_CONNECTION

    def has_ended(self, directory: Path, connection: int) -> bool:
        """Return True if the device was taken away."""
        return not any(path.exists() for path in self.devices_of(directory))

    def send_again(self, connection: int) -> None:  # noqa: B027 - with most kinds the next server does it
        """Have the kernel hand out again the requests that dead servers took and did not answer."""

    def can_change_servers(self) -> bool:
        """Return True if a device can get another server on this host. Raises DeviceError if the kind is missing."""
        return True

    def give_up(self, directory: Path) -> None:  # noqa: B027 - FUSE ends with its last connection
        """Fail the requests of a device that will get no other server."""

    @abstractmethod
    def devices_of(self, directory: Path) -> list[Path]:
        """Return the nodes of the device at ``directory``: one, or an empty list if the device is missing."""

    @abstractmethod
    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        """Remove the device from the kernel. A missing device is fine.

        Raises DeviceError, having changed nothing, while a file system is mounted from it, unless ``force``: then its
        users get I/O errors.
        """

    def take_down_when_unused(self, directory: Path) -> bool:
        """Have the kernel remove the device after its last user. Return False if it cannot: the caller must wait."""
        return False

    def directories_below(self, parent: Path) -> set[Path]:
        """Return directories below ``parent`` that have devices, as far as the kernel shows them."""
        return set()


class FuseLoop(Kind):
    """A file over FUSE and a loop device on it: on every kernel; devices outlive servers from Linux 6.9 on."""

    name = "fuse+loop"
    fix = "modprobe -a fuse loop"
    is_shared = True

    def missing(self) -> str:
        return _cannot_open(Path("/dev/fuse")) or _cannot_open(Path("/dev/loop-control"))

    def make(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str,
        readahead_kib: int,
        connection: int,
        path: Path | None,
        on_busy: Callable[[], None] | None,
    ) -> Device:
        from obdlab.devices.fuse_loop import FuseLoopDevice

        return FuseLoopDevice(
            blob,
            directory,
            name=name,
            readahead_kib=readahead_kib,
            connection=connection,
            path=path,
            on_busy=on_busy,
            exchangeable=bool(getattr(blob, "graduates", False)),
        )

    def connect(self) -> int:
        from obdlab.devices.fuse import open_connection

        return open_connection()

    def has_ended(self, directory: Path, connection: int) -> bool:
        from obdlab.devices.fuse import has_ended

        return has_ended(connection)

    def send_again(self, connection: int) -> None:
        from obdlab.devices.fuse import send_again

        send_again(connection)

    def can_change_servers(self) -> bool:
        from obdlab.devices.fuse import can_send_again

        return can_send_again()

    def devices_of(self, directory: Path) -> list[Path]:
        from obdlab.devices import fuse_loop

        return fuse_loop.devices_of(directory)

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        from obdlab.devices import fuse_loop

        fuse_loop.take_down(directory, timeout_s=timeout_s, force=force)

    def take_down_when_unused(self, directory: Path) -> bool:
        from obdlab.devices import fuse_loop

        fuse_loop.take_down_when_unused(directory)
        return True

    def directories_below(self, parent: Path) -> set[Path]:
        from obdlab.devices import fuse_loop

        return fuse_loop.directories_below(parent)


class FuseFile(FuseLoop):
    """A file over FUSE from which EROFS is mounted (Linux 6.12): no block device, for read-only images alone."""

    name = "fuse+file"
    fix = "Linux 6.12 or later with CONFIG_EROFS_FS_BACKED_BY_FILE"

    def missing(self) -> str:
        from obdlab.devices import fuse_file

        return _cannot_open(Path("/dev/fuse")) or fuse_file.kernel_refuses()

    def make(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str,
        readahead_kib: int,
        connection: int,
        path: Path | None,
        on_busy: Callable[[], None] | None,
    ) -> Device:
        from obdlab.devices.fuse_file import FuseFileDevice

        return FuseFileDevice(blob, directory, name=name, connection=connection, path=path, on_busy=on_busy)

    def devices_of(self, directory: Path) -> list[Path]:
        from obdlab.devices import fuse_file

        return fuse_file.devices_of(directory)

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        from obdlab.devices import fuse_file

        fuse_file.take_down(directory, force=force)

    def take_down_when_unused(self, directory: Path) -> bool:
        return True  # it goes by itself

    def directories_below(self, parent: Path) -> set[Path]:
        return set()


class Ublk(Kind):
    """A ublk device (Linux 6.4): the fewest steps in the kernel; it cannot grow."""

    name = "ublk"
    fix = "modprobe ublk_drv (Linux 6.4 or later)"

    def missing(self) -> str:
        return _cannot_open(_UBLK_CONTROL)

    def make(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str,
        readahead_kib: int,
        connection: int,
        path: Path | None,
        on_busy: Callable[[], None] | None,
    ) -> Device:
        from obdlab.devices.ublk.device import UblkDevice

        return UblkDevice(blob, directory, name=name, readahead_kib=readahead_kib, recover=path is not None)

    def give_up(self, directory: Path) -> None:
        from obdlab.devices.ublk import device

        device.abandon(directory)

    def devices_of(self, directory: Path) -> list[Path]:
        if not _UBLK_CONTROL.exists():
            return []
        from obdlab.devices.ublk import device

        return device.devices_of(directory)

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        if _UBLK_CONTROL.exists():
            from obdlab.devices.ublk import device

            device.take_down(directory, timeout_s=timeout_s, force=force)


class Tcmu(Kind):
    """A SCSI disk over TCMU and tcm_loop, as overlaybd itself serves (Linux 5.0)."""

    name = "tcmu"
    fix = "modprobe -a target_core_user tcm_loop sd_mod; mount -t configfs none /sys/kernel/config"

    def missing(self) -> str:
        for path in (_CONFIGFS_TARGET / "core", Path("/sys/module/target_core_user"), Path("/sys/module/tcm_loop")):
            if not path.exists():
                return f"{path}: No such file or directory"
        return "" if os.access(_CONFIGFS_TARGET / "core", os.W_OK) else f"{_CONFIGFS_TARGET}: Permission denied"

    def make(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str,
        readahead_kib: int,
        connection: int,
        path: Path | None,
        on_busy: Callable[[], None] | None,
    ) -> Device:
        from obdlab.devices.tcmu.device import TcmuDevice

        return TcmuDevice(blob, directory, name=name, readahead_kib=readahead_kib, recover=path is not None)

    def give_up(self, directory: Path) -> None:
        from obdlab.devices.tcmu import device

        device.abandon(directory)

    def devices_of(self, directory: Path) -> list[Path]:
        if not _CONFIGFS_TARGET.exists():
            return []
        from obdlab.devices.tcmu import device

        return device.devices_of(directory)

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        if _CONFIGFS_TARGET.exists():
            from obdlab.devices.tcmu import device

            device.take_down(directory, timeout_s=timeout_s, force=force)

    def directories_below(self, parent: Path) -> set[Path]:
        if not _CONFIGFS_TARGET.exists():
            return set()
        from obdlab.devices.tcmu import device

        return device.directories_below(parent)


#: By name.
KINDS: dict[str, Kind] = {kind.name: kind for kind in (FuseLoop(), FuseFile(), Ublk(), Tcmu())}


def find(name: str) -> Kind:
    """Return the kind of that name, or the best that this host has for ``auto``. Raises DeviceError."""
    if name == AUTOMATIC:
        return best()
    kind = KINDS.get(name)
    if kind is None:
        raise DeviceError(f"no such kind of device (got {name!r}, wanted {AUTOMATIC} or one of {', '.join(KINDS)})")
    return kind


def check(kind: Kind) -> None:
    """Raise DeviceError, saying what to do, if this host has no such devices."""
    trouble = kind.missing()
    if trouble:
        raise DeviceError(f"this host has no {kind.name} devices: {trouble} (try: {kind.fix})")


def best() -> Kind:
    """Return the best kind that this host has: first one whose devices outlive their servers, then the most tested.

    On Linux 6.9 and later that is FUSE and loop, where several processes serve a busy device as well. On older
    kernels: ublk, then TCMU, then FUSE and loop, whose devices end with their servers there.
    """
    fuse = KINDS[FuseLoop.name]
    others = [KINDS[name] for name in (Ublk.name, Tcmu.name) if not KINDS[name].missing()]
    if not others or (not fuse.missing() and fuse.can_change_servers()):
        return fuse
    return others[0]


def devices_of(directory: Path) -> list[Path]:
    """Return the nodes of the device at ``directory``, of any kind."""
    return [path for kind in KINDS.values() for path in kind.devices_of(directory)]


def take_down(directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
    """Remove the device at ``directory``, of any kind, from the kernel: see :meth:`Kind.take_down`."""
    for kind in KINDS.values():
        kind.take_down(directory, timeout_s=timeout_s, force=force)


def is_unused(directory: Path) -> bool:
    """Return True if the device has no exclusive user, such as a file system of any mount namespace."""
    return not any(loop.in_use(path) for path in devices_of(directory))


def directories_below(parent: Path) -> set[Path]:
    """Return the directories below ``parent`` that have devices, including deleted directories."""
    return {directory for kind in KINDS.values() for directory in kind.directories_below(parent)}


def _cannot_open(node: Path) -> str:
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:  # in use, so it exists
            return ""
        return f"{node}: {error.strerror}"
    return ""
