"""A blob as a ublk block device of this host, served by this process."""

from __future__ import annotations

import errno
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import loop
from obdlab.devices.device import Device, DeviceStatistics
from obdlab.devices.ublk import control
from obdlab.devices.ublk.server import UblkServer
from obdlab.devices.usage import wait_unused
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from obdlab.blob import Blob

_DEPTH = 128
_MAX_BYTES = 1 << 20
_NODE_S = 10.0
_RECORD = "ublk.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class UblkDevice(Device):
    """Serves ``blob`` as a ublk device. ``directory`` is the device's own: others find the device by it.

    With ``recover`` it takes over the device of a server that died: users of the device saw a pause, and what was
    under way is asked for again. Raises DeviceError, leaving nothing new behind, if the blob is no whole number of
    sectors or the kernel refuses.
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
        if blob.size == 0 or blob.size % sector_size:
            raise DeviceError(
                f"{blob.name}: a device needs a whole number of {sector_size}-byte sectors (got {blob.size} bytes)"
            )
        self._directory = directory
        self._size = blob.size
        self._closed = False
        with ExitStack() as failed:
            if recover:
                self._number = _recorded(directory)
                control.start_recovery(self._number)
            else:
                self._number = control.add(depth=_DEPTH, max_bytes=_MAX_BYTES)
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
                _record(directory, self._number)
                failed.callback((directory / _RECORD).unlink, missing_ok=True)
                self._start()
                failed.callback(self._server.wait, _NODE_S)
                failed.callback(control.stop, self._number)
                control.start(self._number)
            _wait_for(self.path)
            loop.set_readahead(self.path, readahead_kib)
            failed.pop_all()

    @property
    def path(self) -> Path:
        return Path(f"/dev/ublkb{self._number}")

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._server.read_only

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

    def stop(self, timeout_s: float = 10.0) -> None:
        _stop(self._directory, force=False)
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


def devices_of(directory: Path) -> list[Path]:
    """Return the device that belongs to a device's directory, if there is one."""
    try:
        number = _recorded(directory)
    except DeviceError:
        return []
    return [Path(f"/dev/ublkb{number}")] if Path(f"/dev/ublkc{number}").exists() else []


def take_down(directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
    """Take the device of ``directory`` away, whereupon its server ends. None being there is fine.

    Raises DeviceError while a file system is mounted from it, unless ``force``: then its users get I/O errors.
    """
    _stop(directory, force=force)
    if devices_of(directory):
        _remove(_recorded(directory), timeout_s)
    (directory / _RECORD).unlink(missing_ok=True)


def _stop(directory: Path, *, force: bool) -> None:
    for device in devices_of(directory):
        if device.exists():
            if not force:
                wait_unused(device)
            control.stop(_recorded(directory))


def _remove(number: int, timeout_s: float = 10.0) -> None:
    try:
        control.delete(number)
    except control.UblkError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT):  # another was faster
            raise
    node, deadline = Path(f"/dev/ublkc{number}"), time.monotonic() + timeout_s
    while node.exists():
        if time.monotonic() > deadline:
            raise DeviceError(f"{node}: its server still has it {timeout_s:g} s after the device was stopped")
        time.sleep(0.005)


# The driver keeps no names: which device is whose is written down, for this boot.
def _record(directory: Path, number: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _RECORD).write_text(json.dumps({"number": number, "boot_id": _BOOT_ID.read_text().strip()}))


def _recorded(directory: Path) -> int:
    try:
        known = json.loads((directory / _RECORD).read_text())
        if known["boot_id"] == _BOOT_ID.read_text().strip():
            return int(known["number"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DeviceError(f"{directory}: no ublk device is known for it")


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
