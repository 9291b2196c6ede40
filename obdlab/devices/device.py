"""The contract of every kind of block device.

Each kind has its own module and knows blobs, not images. The module has a subclass of Device, used by the serving
process, and a function ``take_down(directory)``, used by any process: it removes a device of this kind from the
kernel, whether or not the device's server is alive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.blob import Blob


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """Counters of a device since its server started: bytes, and the longest time one request took."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    errors: int
    slowest_ms: float
    threads: int
    last_error: str
    #: Histograms of the durations of reads and writes, as :func:`obdlab.observe.counters.times_table` has them.
    read_times: dict[str, float] = field(default_factory=dict)
    write_times: dict[str, float] = field(default_factory=dict)
    #: Age of each request under way.
    under_way_s: tuple[float, ...] = ()


def check_sectors(blob: Blob, sector_size: int) -> None:
    """Raise DeviceError unless the blob is a whole number of sectors."""
    if blob.size == 0 or blob.size % sector_size:
        raise DeviceError(
            f"{blob.name}: a device needs a whole number of {sector_size}-byte sectors (got {blob.size} bytes)"
        )


class Device(ABC):
    """A blob as a block device, served by threads of this process from construction until :meth:`stop`."""

    #: Name of the kind in records and messages.
    kind: str = ""
    #: Whether the kernel can go on with a file in place of the server (:mod:`obdlab.devices.backingfile`).
    can_graduate = False

    @property
    @abstractmethod
    def path(self) -> Path:
        """The device node."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Size in bytes."""

    @property
    @abstractmethod
    def read_only(self) -> bool:
        """Whether writes are refused."""

    @property
    @abstractmethod
    def in_use(self) -> bool:
        """Whether a file system, or another user that claims the whole device, holds it: stopping would break it."""

    @property
    def can_change_servers(self) -> bool:
        """Whether another process can go on with the requests that this one leaves unanswered."""
        return False

    def is_mounted_now(self) -> None:  # noqa: B027 - a block device stays without a mount
        """Note that the device is mounted: the mount holds it from now on."""

    def take_on_size(self) -> None:
        """Grow to the present size of the blob. Raises DeviceError, also if the kind cannot grow."""
        raise DeviceError(f"{self.path}: a {self.kind} device cannot grow while it is attached")

    @abstractmethod
    def statistics(self) -> DeviceStatistics:
        """Return counters since the start."""

    @abstractmethod
    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the device has been taken away, by any process. Return False on timeout."""

    @abstractmethod
    def stop(self, timeout_s: float = 10.0) -> None:
        """Take the device away and leave nothing in the kernel. Raises DeviceError while it is in use."""
