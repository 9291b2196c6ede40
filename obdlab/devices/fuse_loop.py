"""A block device without kernel modules: one file over FUSE, and a loop device on top."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from obdlab.devices import abi, loop
from obdlab.devices.device import Device
from obdlab.devices.fuse import DISK_NAME, DeviceStatistics, FuseServer
from obdlab.devices.mount import mounts_at, mounts_of
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.blob import Blob

#: Below a device's directory: where FUSE is mounted.
MOUNT_NAME = "fuse"
_TRANSIENT_USE_S = 1.0


class FuseLoopDevice(Device):
    """Serves ``blob`` as a loop device over a FUSE mount at ``directory/fuse``.

    Raises DeviceError, leaving nothing behind, if the blob is no whole number of sectors or the kernel refuses.
    """

    kind = "fuse+loop"

    def __init__(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str = "",
        read_only: bool = False,
        sector_size: int = abi.SECTOR,
        readahead_kib: int = 128,
        max_threads: int = 64,
    ) -> None:
        if blob.size == 0 or blob.size % sector_size:
            raise DeviceError(
                f"{blob.name}: a device needs a whole number of {sector_size}-byte sectors (got {blob.size} bytes)"
            )
        self._directory = directory.resolve()
        self._size = blob.size
        mountpoint = self._directory / MOUNT_NAME
        mountpoint.mkdir(parents=True, exist_ok=True)
        self._server = FuseServer(blob, mountpoint, name=name, read_only=read_only, max_threads=max_threads)
        self._server.start()
        try:
            self._path = loop.attach(
                self._server.disk,
                read_only=self._server.read_only,
                sector_size=sector_size,
                readahead_kib=readahead_kib,
            )
        except BaseException:
            self.stop()
            raise

    @property
    def path(self) -> Path:
        return self._path

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._server.read_only

    @property
    def in_use(self) -> bool:
        return loop.in_use(self._path)

    def statistics(self) -> DeviceStatistics:
        return self._server.statistics()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._server.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        take_down(self._directory, timeout_s=timeout_s)
        if not self._server.wait(timeout_s):
            raise DeviceError(f"{self._directory}: requests are still being served {timeout_s:g} s after unmounting")


# A container being started copies all mounts for a moment and drops them; only longer use is use.
def _wait_unused(device: Path) -> None:
    deadline = time.monotonic() + _TRANSIENT_USE_S
    while loop.in_use(device):
        if mounts_of(device) or time.monotonic() > deadline:
            raise DeviceError(f"{device}: still in use ({_users(device)})")
        time.sleep(0.02)


def _users(device: Path) -> str:
    found = [f"mounted on {entry.mountpoint}" for entry in mounts_of(device)]
    return ", ".join(found) or "by an overlay or another mount namespace, such as a container's"


def take_down(directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
    """Detach the loop devices over ``directory/fuse/disk``, then unmount it. Nothing there is fine.

    Raises DeviceError naming the loop device while a file system is mounted from it, unless ``force``: then the
    device disappears under its users, who get I/O errors.
    """
    mountpoint = directory.resolve() / MOUNT_NAME
    disk = mountpoint / DISK_NAME
    for device in loop.devices_of(disk):
        if not force:
            _wait_unused(device)
        try:
            loop.detach(device, file=disk, timeout_s=min(timeout_s, 1.0) if force else timeout_s)
        except DeviceError:
            if not force:  # forced: it goes with its last user
                raise
    deadline = time.monotonic() + timeout_s
    while mounts_at(mountpoint):
        try:
            abi.umount2(mountpoint, abi.UMOUNT_NOFOLLOW | (abi.MNT_DETACH if force else 0))
        except OSError as error:
            if error.errno == errno.EINVAL:  # somebody else was faster
                continue
            if error.errno != errno.EBUSY:
                raise DeviceError(f"{mountpoint}: cannot unmount: {error.strerror}") from error
            if time.monotonic() > deadline:
                raise DeviceError(f"{mountpoint}: still busy after {timeout_s:g} s") from error
            time.sleep(0.01)
