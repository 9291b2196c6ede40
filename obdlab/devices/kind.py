"""The contract of a kind of block device: making, finding and ending its devices.

Besides the device itself, kinds differ in how a device outlives the process that serves it. Other processes hold the
connection of a FUSE file too and hand it on. A TCMU or ublk device stays in the kernel without a server, and the next
server finds it by its directory.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

#: Stands for the connection of kinds without connections.
NO_CONNECTION = -1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device is served, and how."""

    #: The device's own directory, by which every process finds it.
    directory: Path
    #: In messages and names of threads.
    name: str = ""
    readahead_kib: int = 128
    #: The connection that :meth:`Kind.connect` returned.
    connection: int = NO_CONNECTION
    #: The device to go on with, whose server is gone; None for a new device.
    path: Path | None = None
    #: Called while more processes would help.
    on_busy: Callable[[], None] | None = None
    #: True if the kernel may go on with a file in place of the server (:mod:`obdlab.devices.backingfile`).
    exchangeable: bool = False


class Kind(ABC):
    """One kind of block device. ``directory`` is always the device's own; every process finds the device by it."""

    name: str
    #: How to give such devices to a host that lacks them.
    fix: str
    #: Whether several processes can serve a device at a time.
    is_shared = False
    #: Whether devices are files that a mount keeps open, and not block devices: mounted once, and bound from there.
    is_file = False
    #: Which kind ``auto`` takes on a host without FUSE devices that outlive their servers: the highest; 0: never.
    preference = 0
    #: Module that serving a device needs, imported by the device host so that no server has to.
    implementation = ""

    @abstractmethod
    def missing(self) -> str:
        """Return the reason why this host cannot have such devices, or ''."""

    @abstractmethod
    def open(self, blob: Blob, place: Place) -> Device:
        """Serve ``blob`` from this process. Raises DeviceError."""

    def connect(self) -> int:
        """Return the descriptor that a device's servers hand on to each other, or NO_CONNECTION. Raises DeviceError.

        The caller passes it back in ``Place`` and to the other methods.
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


class StayingKind(Kind):
    """A kind whose devices stay in the kernel without a server; the next server finds them by their directory.

    Clients look for devices of every kind, so the module ``implementation`` is imported only on hosts that have
    ``control``. It has DEVICE, a class of devices, and the functions devices_of, take_down and abandon.
    """

    control: Path

    def open(self, blob: Blob, place: Place) -> Device:
        device: Device = self.module.DEVICE(
            blob,
            place.directory,
            name=place.name,
            readahead_kib=place.readahead_kib,
            recover=place.path is not None,
        )
        return device

    def give_up(self, directory: Path) -> None:
        self.module.abandon(directory)

    def devices_of(self, directory: Path) -> list[Path]:
        found: list[Path] = self.module.devices_of(directory) if self.control.exists() else []
        return found

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        if self.control.exists():
            self.module.take_down(directory, timeout_s=timeout_s, force=force)

    @property
    def module(self) -> Any:
        """The implementation."""
        return import_module(self.implementation)


def cannot_open(node: Path) -> str:
    """Return the reason why a device node cannot be opened, or ''."""
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:  # in use, so it exists
            return ""
        return f"{node}: {error.strerror}"
    return ""
