"""An EROFS image mounted straight from the served file, without a loop device (Linux 6.12).

The file system of the served file is mounted nowhere, so the file has no path. Until the image is mounted, the server
keeps the file open, and a link in the device's directory leads to that descriptor: mount(2) follows it, and the
kernel shows the link's path as the mount's source. Once mounted, EROFS holds the file, and the device ends with the
last mount in any mount namespace.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices.device import Device
from obdlab.devices.fuse import DeviceStatistics, FuseServer
from obdlab.devices.fuse_loop import FuseLoop
from obdlab.devices.kind import Place, cannot_open
from obdlab.devices.usage import TRANSIENT_USE_S, namespaces_that_mount
from obdlab.errors import DeviceError
from obdlab.system import abi, mount, superblock

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob

_LINK = "disk"
#: A device that stays unmounted for this long ends.
UNMOUNTED_S = 60.0
_LOOK_S = 0.05


class FuseFileDevice(Device):
    """Serves ``blob``, which holds an EROFS, for mount(2) to find at :attr:`path`, until it is no longer mounted.

    ``connection``, ``path`` and ``on_busy`` as for FuseLoopDevice. Raises DeviceError if the blob holds something
    else.
    """

    kind = "fuse+file"

    def __init__(
        self,
        blob: Blob,
        directory: Path,
        *,
        name: str = "",
        connection: int | None = None,
        path: Path | None = None,
        on_busy: Callable[[], None] | None = None,
    ) -> None:
        self._blob = blob
        self._directory = directory
        self._server = FuseServer(blob, name=name, on_busy=on_busy)
        self._mounted = threading.Event()
        if not self._server.read_only:
            raise DeviceError(f"{blob.name}: writable; only read-only images can be mounted without a block device")
        kind = superblock.kind_of(blob.read_at(0, min(superblock.SUPERBLOCK_END, blob.size)))
        if kind != "erofs":
            raise DeviceError(
                f"{blob.name}: holds {kind or 'no file system that is known'}; only EROFS can be mounted without a "
                "block device"
            )
        if path is not None:
            assert connection is not None
            self._server.join(connection)
            return
        root = self._server.start(connection)
        try:
            self._hold(self._server.open_disk(root))
        finally:
            os.close(root)

    def _hold(self, disk: int) -> None:
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(f"/proc/{os.getpid()}/fd/{disk}")

        def let_go() -> None:
            waited = 0.0
            while waited < UNMOUNTED_S and self.path.is_symlink() and not self._mounted.wait(_LOOK_S):
                waited += _LOOK_S
            os.close(disk)

        threading.Thread(target=let_go, name="unmounted", daemon=True).start()

    def is_mounted_now(self) -> None:
        """Note that the file is mounted: the mount holds it from now on."""
        self._mounted.set()

    @property
    def path(self) -> Path:
        return _link(self._directory)

    @property
    def size(self) -> int:
        return self._blob.size

    @property
    def read_only(self) -> bool:
        return True

    @property
    def in_use(self) -> bool:
        return bool(users_of(self._directory))

    @property
    def can_change_servers(self) -> bool:
        """Whether another process can go on with the requests that this one leaves unanswered (Linux 6.9)."""
        return self._server.can_send_again

    def statistics(self) -> DeviceStatistics:
        return self._server.statistics()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._server.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        take_down(self._directory)
        if not self._server.wait(timeout_s):
            raise DeviceError(f"{self.path}: requests are still being served {timeout_s:g} s after it was taken away")


def take_down(directory: Path, *, force: bool = False) -> None:
    """Let the file of the device at ``directory`` go. A missing device is fine.

    Raises DeviceError naming the mounts, unless ``force``: then unmounts lazily, in this mount namespace.
    """
    users = users_of(directory)
    deadline = time.monotonic() + TRANSIENT_USE_S
    while users and not force and not mount.mounts_of(_link(directory)) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        users = users_of(directory)
    if users and not force:
        raise DeviceError(f"device {directory.name}: still in use ({', '.join(users)})")
    for entry in mount.mounts_of(_link(directory)):
        mount.unmount(entry.mountpoint, lazy=True)
    with suppress(FileNotFoundError):
        if _link(directory).is_symlink():
            _link(directory).unlink()


def devices_of(directory: Path) -> list[Path]:
    """Return the link to the served file, if this is a device of this kind."""
    return [_link(directory)] if _link(directory).is_symlink() else []


def users_of(directory: Path) -> list[str]:
    """Return texts that name the file's mounts, in any mount namespace."""
    link = _link(directory)
    if not link.is_symlink():
        return []
    here = [f"mounted on {entry.mountpoint}" for entry in mount.mounts_of(link)]
    return here or namespaces_that_mount(f" - erofs {mount.escape(str(link))} ".encode())


def kernel_refuses() -> str:
    """Return the reason why this kernel mounts no EROFS from a file; '' if it does."""
    import tempfile  # takes long to import, and is rarely needed

    with tempfile.NamedTemporaryFile() as file:
        file.truncate(superblock.SUPERBLOCK_END)
        try:
            abi.mount_detached("erofs", {"source": file.name}, abi.MOUNT_ATTR_RDONLY)
        except OSError as error:
            if error.errno == errno.EINVAL:  # it has looked into the file and found no EROFS
                return ""
            if error.errno == errno.ENOTBLK:
                return "the kernel mounts EROFS from block devices only"
            return f"the kernel mounts no EROFS: {error.strerror}"
    return "the kernel takes zeros for an EROFS"


def _link(directory: Path) -> Path:
    return directory / _LINK


class FuseFile(FuseLoop):
    """A file over FUSE from which EROFS is mounted (Linux 6.12): no block device, for read-only images alone."""

    name = FuseFileDevice.kind
    fix = "Linux 6.12 or later with CONFIG_EROFS_FS_BACKED_BY_FILE"
    is_file = True

    def missing(self) -> str:
        return cannot_open(Path("/dev/fuse")) or kernel_refuses()

    def open(self, blob: Blob, place: Place) -> Device:
        return FuseFileDevice(
            blob,
            place.directory,
            name=place.name,
            connection=place.connection,
            path=place.path,
            on_busy=place.on_busy,
        )

    def devices_of(self, directory: Path) -> list[Path]:
        return devices_of(directory)

    def take_down(self, directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
        take_down(directory, force=force)

    def take_down_when_unused(self, directory: Path) -> bool:
        return True  # it goes by itself

    def directories_below(self, parent: Path) -> set[Path]:
        return set()


KIND = FuseFile()
