"""A blob as a ublk block device of this host, served by this process."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.contrib.ublk import control
from obdlab.contrib.ublk.server import UblkServer
from obdlab.devices import loop
from obdlab.devices.stayingdevice import StayingDevice
from obdlab.devices.usage import wait_unused
from obdlab.errors import DeviceError
from obdlab.system.pauses import wait_until

if TYPE_CHECKING:
    from contextlib import ExitStack

    from obdlab.blob import Blob
    from obdlab.devices.stayingdevice import Options

_DEPTH = 128
_MAX_BYTES = 1 << 20
_NODE_S = 10.0
_RECOVERY_S = 30.0


class UblkDevice(StayingDevice):
    """A ublk device."""

    kind = "ublk"
    _server: UblkServer

    def _make(self, options: Options, failed: ExitStack) -> None:
        self._number = control.add(depth=_DEPTH, max_bytes=_MAX_BYTES, mark=_mark(self._directory))
        failed.callback(_remove, self._number)
        self._open(options, failed)
        control.set_params(
            self._number,
            size=self._size,
            sector_size=options.sector_size,
            max_bytes=_MAX_BYTES,
            read_only=self._server.read_only,
        )
        self._start()
        failed.callback(self._server.wait, _NODE_S)
        failed.callback(control.stop, self._number)
        control.start(self._number)
        self._finish(options)

    def _recover(self, options: Options, failed: ExitStack) -> None:
        self._number = _to_recover(self._directory, self._blob)
        self._open(options, failed)
        self._start()
        control.end_recovery(self._number)
        self._finish(options)

    def _open(self, options: Options, failed: ExitStack) -> None:
        self._character = _open_node(Path(f"/dev/ublkc{self._number}"))
        failed.callback(self._close)
        self._server = UblkServer(
            self._character,
            self._blob,
            depth=_DEPTH,
            name=options.name,
            read_only=options.read_only,
            max_threads=options.max_threads,
        )

    def _start(self) -> None:
        try:
            self._server.start()
        except OSError as error:
            raise DeviceError(f"{self.path}: {error.strerror}") from error

    def _finish(self, options: Options) -> None:
        _wait_for(self.path)
        loop.set_readahead(self.path, options.readahead_kib)

    @property
    def path(self) -> Path:
        return _node(self._number)

    @property
    def read_only(self) -> bool:
        return self._server.read_only

    @property
    def can_change_servers(self) -> bool:
        return True

    def stop(self, timeout_s: float = 10.0) -> None:
        number = _number_of(self._directory)
        if number is not None:
            _stop(number, force=False)
        self._wait_for_last(timeout_s)
        take_down(self._directory)

    def _release(self) -> None:
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
    node = Path(f"/dev/ublkc{number}")
    if not wait_until(lambda: not node.exists(), timeout_s, look_s=0.005):
        raise DeviceError(f"{node}: its server still has it {timeout_s:g} s after the device was stopped")


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
    if not wait_until(node.exists, _NODE_S, look_s=0.005):
        raise DeviceError(f"{node}: did not appear within {_NODE_S:g} s")
