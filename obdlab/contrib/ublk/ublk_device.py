"""A blob as a ublk block device of this host, served by this process."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.contrib.ublk import control
from obdlab.contrib.ublk.server import UblkServer
from obdlab.devices import loop
from obdlab.devices.device import Device, DeviceStatistics, check_sectors
from obdlab.devices.usage import wait_unused
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from obdlab.blob import Blob

_DEPTH = 128
_MAX_BYTES = 1 << 20
_NODE_S = 10.0
_RECOVERY_S = 30.0


class UblkDevice(Device):
    """Serves ``blob`` as a ublk device. ``directory`` is the device's own: other processes find the device by it.

    With ``recover`` it takes over the device of a server that died: the device's users saw a pause, and the driver
    hands out requests under way again. Raises DeviceError, leaving nothing new behind, if the blob's size is not a
    multiple of the sector size or the kernel refuses.
    """

    kind = "ublk"

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
        self._directory = directory
        self._size = blob.size
        self._closed = False
        with ExitStack() as failed:
            if recover:
                self._number = _to_recover(directory, blob)
            else:
                self._number = control.add(depth=_DEPTH, max_bytes=_MAX_BYTES, mark=_mark(directory))
                failed.callback(_remove, self._number)
            self._character = _open_node(Path(f"/dev/ublkc{self._number}"))
            failed.callback(self._close)
            self._server = UblkServer(
                self._character,
                blob,
                depth=_DEPTH,
                name=name or blob.name,
                read_only=read_only,
                max_threads=max_threads,
            )
            if recover:
                self._start()
                control.end_recovery(self._number)
            else:
                control.set_params(
                    self._number,
                    size=blob.size,
                    sector_size=sector_size,
                    max_bytes=_MAX_BYTES,
                    read_only=self._server.read_only,
                )
                self._start()
                failed.callback(self._server.wait, _NODE_S)
                failed.callback(control.stop, self._number)
                control.start(self._number)
            _wait_for(self.path)
            loop.set_readahead(self.path, readahead_kib)
            failed.pop_all()

    @property
    def path(self) -> Path:
        return _node(self._number)

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._server.read_only

    @property
    def in_use(self) -> bool:
        return loop.in_use(self.path)

    @property
    def can_change_servers(self) -> bool:
        return True

    def statistics(self) -> DeviceStatistics:
        return self._server.statistics()

    def wait(self, timeout_s: float | None = None) -> bool:
        if not self._server.wait(timeout_s):
            return False
        self._close()
        return True

    def stop(self, timeout_s: float = 10.0) -> None:
        number = _number_of(self._directory)
        if number is not None:
            _stop(number, force=False)
        if not self.wait(timeout_s):
            raise DeviceError(f"{self.path}: requests are still being served {timeout_s:g} s after it was stopped")
        take_down(self._directory)

    def _start(self) -> None:
        try:
            self._server.start()
        except OSError as error:
            raise DeviceError(f"{self.path}: {error.strerror}") from error

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._character)


DEVICE = UblkDevice


def devices_of(directory: Path) -> list[Path]:
    """Return the device that belongs to a device's directory, or an empty list."""
    number = _number_of(directory)
    return [] if number is None else [_node(number)]


def take_down(directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
    """Take the device of ``directory`` away, which ends its server. A missing device is fine.

    Raises DeviceError while a file system is mounted from it, unless ``force``: then its users get I/O errors.
    """
    number = _number_of(directory)
    if number is not None:
        _stop(number, force=force)
        _remove(number, timeout_s)


def abandon(directory: Path) -> None:
    """Have all present and later requests to the device at ``directory`` fail: it gets no other server."""
    number = _number_of(directory)
    if number is not None:
        control.stop(number)


def _stop(number: int, *, force: bool) -> None:
    if _node(number).exists():
        if not force:
            wait_unused(_node(number))
        control.stop(number)


def _node(number: int) -> Path:
    return Path(f"/dev/ublkb{number}")


def _remove(number: int, timeout_s: float = 10.0) -> None:
    try:
        control.delete(number)
    except control.UblkError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT):  # another process was faster
            raise
    node, deadline = Path(f"/dev/ublkc{number}"), time.monotonic() + timeout_s
    while node.exists():
        if time.monotonic() > deadline:
            raise DeviceError(f"{node}: its server still has it {timeout_s:g} s after the device was stopped")
        time.sleep(0.005)


# The driver keeps only 64 bits of ours, the mark: a hash of the directory.
def _mark(directory: Path) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(directory.resolve())).digest()[:8], "big")


def _number_of(directory: Path) -> int | None:
    mark = _mark(directory)
    for node in Path("/dev").glob("ublkc*"):
        with suppress(DeviceError, ValueError):  # gone meanwhile
            number = int(node.name.removeprefix("ublkc"))
            if control.mark_of(number) == mark:
                return number
    return None


# The driver notices the death of a server within a few seconds, and lets another server take over only then.
def _to_recover(directory: Path, blob: Blob) -> int:
    number = _number_of(directory)
    if number is None:
        raise DeviceError(f"{directory}: no ublk device is there to go on with")
    loop.check_size(_node(number), blob.size, blob.name)
    deadline = time.monotonic() + _RECOVERY_S
    while True:
        try:
            control.start_recovery(number)
        except control.UblkError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        else:
            return number
        time.sleep(0.01)


def _open_node(node: Path) -> int:
    _wait_for(node)
    deadline = time.monotonic() + _NODE_S
    while True:
        try:
            return os.open(node, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:  # a dead server's last thread may still hold it
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise DeviceError(f"{node}: cannot open: {error.strerror}") from error
        time.sleep(0.01)


def _wait_for(node: Path) -> None:
    deadline = time.monotonic() + _NODE_S
    while not node.exists():
        if time.monotonic() > deadline:
            raise DeviceError(f"{node}: did not appear within {_NODE_S:g} s")
        time.sleep(0.005)
