"""TCMU devices in the kernel: UIO devices named ``tcm-user/<hba>/<device>/<dev_config>``."""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from obdlab.errors import DeviceError

_SYS_UIO = Path("/sys/class/uio")
_SUBTYPE = "tcm-user"


class DeviceBusyError(DeviceError, code="busy"):
    """Another process serves the device."""


@dataclass(frozen=True, slots=True)
class UioName:
    """The parts of a device's name: ``handler`` is the serving program, ``config`` the text meant for it."""

    hba: str
    device: str
    handler: str
    config: str

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse a name; None if it is not a TCMU device's."""
        subtype, _, rest = text.rstrip("\n").partition("/")
        hba, _, rest = rest.partition("/")
        device, _, rest = rest.partition("/")
        handler, slash, config = rest.partition("/")
        if subtype != _SUBTYPE or not hba.isdecimal() or not device or not slash:
            return None
        return cls(hba, device, handler, config)

    @property
    def backstore(self) -> Path:
        """The device's directory in configfs."""
        return Path("/sys/kernel/config/target/core") / f"user_{self.hba}" / self.device

    @property
    def is_configured(self) -> bool:
        """Whether the kernel has answered the device's maker; before that, the device will come as an event."""
        try:
            return (self.backstore / "enable").read_text().strip() == "1"
        except OSError:  # gone
            return False


def devices() -> dict[int, UioName]:
    """Return the TCMU devices by their UIO number."""
    found = {}
    for directory in _SYS_UIO.glob("uio*"):
        try:
            name = UioName.parse((directory / "name").read_text())
        except OSError:  # gone meanwhile
            continue
        if name is not None:
            found[int(directory.name.removeprefix("uio"))] = name
    return found


def number_of(backstore: Path) -> int:
    """Return the UIO number of the device with this directory in configfs. Raises DeviceError."""
    for number, name in devices().items():
        if name.backstore == backstore:
            return number
    raise DeviceError(f"{backstore}: the kernel has no UIO device for it")


@dataclass(slots=True)
class UioDevice:
    """An open device: its descriptor, for events, and the memory shared with the kernel."""

    descriptor: int
    memory: mmap.mmap

    @classmethod
    def open(cls, number: int) -> Self:
        """Open a device. Raises DeviceBusyError while another process has it, DeviceError if the kernel refuses."""
        node = Path(f"/dev/uio{number}")
        try:
            size = int((_SYS_UIO / node.name / "maps/map0/size").read_text(), 16)
            _make_node(node)
            descriptor = os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise DeviceBusyError(f"{node}: served by another process") from error
            raise DeviceError(f"{node}: cannot open: {error.strerror}") from error
        try:
            return cls(descriptor, mmap.mmap(descriptor, size))
        except OSError as error:
            os.close(descriptor)
            raise DeviceError(f"{node}: cannot map {size} bytes: {error.strerror}") from error

    def close(self) -> None:
        """Unmap and close."""
        try:
            self.memory.close()
        finally:
            os.close(self.descriptor)


# A /dev without devtmpfs, as in some containers, lacks the node.
def _make_node(node: Path) -> None:
    if not node.exists():
        major, minor = (_SYS_UIO / node.name / "dev").read_text().split(":")
        os.mknod(node, 0o20600, os.makedev(int(major), int(minor)))
