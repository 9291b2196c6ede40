"""The contract of every kind of block device.

A kind lives in one module and knows blobs, not images. It has a class deriving from Device, used by the process that
serves, and a function ``take_down(directory)``, used by anyone, that removes from the kernel what a device of this
kind left there, whether or not its server is alive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """What a device has done since its server started. Bytes, and the longest time one request took."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    errors: int
    slowest_ms: float
    threads: int
    last_error: str
    #: Histograms of what reads and writes took, as :func:`obdlab.observe.counters.times_table` has them.
    read_times: dict[str, float] = field(default_factory=dict)
    write_times: dict[str, float] = field(default_factory=dict)
    #: How long each request under way has been so.
    under_way_s: tuple[float, ...] = ()


class Device(ABC):
    """A blob as a block device, served by threads of this process from construction until :meth:`stop`."""

    #: Name of the kind in records and messages.
    kind: str = ""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The device node."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes."""

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
        """Whether another process can go on with what this one leaves unanswered."""
        return False

    def take_on_size(self) -> None:
        """Be as large as the blob, which has grown. Raises DeviceError, also where the kind cannot."""
        raise DeviceError(f"{self.path}: a {self.kind} device cannot grow while it is attached")

    @abstractmethod
    def statistics(self) -> DeviceStatistics:
        """Return counters since the start."""

    @abstractmethod
    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the device has been taken away, by whomever; tell whether that is so."""

    @abstractmethod
    def stop(self, timeout_s: float = 10.0) -> None:
        """Take the device away and leave nothing in the kernel. Raises DeviceError while it is in use."""
