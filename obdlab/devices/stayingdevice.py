"""The common part of devices that stay in the kernel without their server (TCMU, ublk)."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from obdlab.devices import loop
from obdlab.devices.device import Device, DeviceStatistics, check_sectors
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.blob import Blob


class Server(Protocol):
    """Answers the kernel's requests to a device."""

    def statistics(self) -> DeviceStatistics:
        """Return the counters."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended. Return False on timeout."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a device. ``name`` is in messages and in names of threads."""

    name: str
    read_only: bool
    sector_size: int
    readahead_kib: int
    max_threads: int


class StayingDevice(Device):
    """Serves ``blob`` as a block device. ``directory`` is the device's own: other processes find the device by it.

    With ``recover`` it takes over the device of a server that died: the device's users saw a pause, and the kernel
    hands out requests under way again. Raises DeviceError, leaving nothing new behind, if the blob's size is not a
    multiple of the sector size or the kernel refuses. A subclass sets ``_server`` when it makes or recovers a device.
    """

    _server: Server

    def __init__(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str = "",
        read_only: bool = False,
        sector_size: int = 512,
        readahead_kib: int = 128,
        max_threads: int = 256,
        recover: bool = False,
    ) -> None:
        check_sectors(blob, sector_size)
        self._blob = blob
        self._directory = directory
        self._size = blob.size
        self._closed = False
        options = Options(name or blob.name, read_only, sector_size, readahead_kib, max_threads)
        with ExitStack() as failed:
            if recover:
                self._recover(options, failed)
            else:
                self._make(options, failed)
            failed.pop_all()

    @abstractmethod
    def _make(self, options: Options, failed: ExitStack) -> None:
        """Make a new device. ``failed`` gets what undoes each step."""

    @abstractmethod
    def _recover(self, options: Options, failed: ExitStack) -> None:
        """Go on with the device at ``directory``. Raises DeviceError if it is missing."""

    @abstractmethod
    def _release(self) -> None:
        """Close the kernel's file of the device."""

    @property
    def size(self) -> int:
        return self._size

    @property
    def in_use(self) -> bool:
        return loop.in_use(self.path)

    def statistics(self) -> DeviceStatistics:
        return self._server.statistics()

    def wait(self, timeout_s: float | None = None) -> bool:
        if not self._server.wait(timeout_s):
            return False
        self._close()
        return True

    def _wait_for_last(self, timeout_s: float) -> None:
        if not self.wait(timeout_s):
            raise DeviceError(f"{self.path}: requests are still being served {timeout_s:g} s after it was stopped")

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._release()
