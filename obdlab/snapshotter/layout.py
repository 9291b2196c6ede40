"""The snapshotter's directory layout. A crash at any moment leaves only nameless leftovers.

::

    <root>/lock
    <root>/metadata.sqlite
    <root>/snapshots/<id>/fs                     the layer, or the container's changes
    <root>/snapshots/<id>/work                   overlayfs work directory (active only)
    <root>/snapshots/<id>/block/config.v1.json   an overlaybd image up to this layer
        <root>/snapshots/<id>/block/mountpoint       mount point of its device
        <root>/snapshots/<id>/block/unpacked         the image's files, if there can be no device
        <root>/snapshots/<id>/block/writable.json    a container's own device: its mode, and the place of its layer
        <root>/snapshots/<id>/block/writable_{data,index}   that layer
        <root>/snapshots/<id>/image_ref              the reference of its image, if known
        <root>/snapshots/new-*                       a directory that is being made

(overlaybd snapshotter, on-disk layout.)
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.server.rundir import SNAPSHOTTER_LOCK
from obdlab.snapshotter.store import Kind, Usage
from obdlab.snapshotter.trees import delete_tree, statuses
from obdlab.system.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Iterable

CONFIG_NAME = "config.v1.json"
WRITABLE_NAME = "writable.json"
#: Metadata of the original snapshotter in its root. Packages of the group ``obdlab.roots`` take it over.
ORIGINAL_NAME = "metadata.db"
_NEW = "new-"


class RootError(ObdlabError):
    """The root directory cannot be used, or another snapshotter uses it."""


class Layout:
    """Paths under one root, and the making and deleting of snapshot directories."""

    def __init__(self, root: Path, *, lock: bool = True) -> None:
        """Make the root (0700) if it is missing and ``lock`` it for this process. Raises RootError."""
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RootError(f"{root}: cannot be the snapshotter's root ({error.strerror})") from error
        self.root = root.resolve()
        if any(char in str(self.root) for char in ":,\\"):
            raise RootError(f"{self.root}: overlay mount options cannot hold this path (wanted none of ':,\\')")
        #: Distinguishes the names of devices and sockets of several snapshotters.
        self.short_name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]
        self.snapshots = self.root / "snapshots"
        self._lock_fd = _lock(self.root / SNAPSHOTTER_LOCK) if lock else -1
        self.snapshots.mkdir(mode=0o700, exist_ok=True)
        self._prefix = f"{self.snapshots}/"

    @property
    def metadata(self) -> Path:
        """The SQLite file."""
        return self.root / "metadata.sqlite"

    def directory(self, snapshot_id: int) -> Path:
        """The directory of one snapshot."""
        return Path(f"{self._prefix}{snapshot_id}")

    def fs(self, snapshot_id: int) -> Path:
        """Lower or upper directory."""
        return Path(f"{self._prefix}{snapshot_id}/fs")

    def work(self, snapshot_id: int) -> Path:
        """Work directory of overlayfs."""
        return Path(f"{self._prefix}{snapshot_id}/work")

    def block(self, snapshot_id: int) -> Path:
        """The files of the block device."""
        return Path(f"{self._prefix}{snapshot_id}/block")

    def config(self, snapshot_id: int) -> Path:
        """The device's configuration. The file exists if the snapshot is the top layer of an overlaybd image."""
        return Path(self._config(snapshot_id))

    def mountpoint(self, snapshot_id: int) -> Path:
        """The mount point of the device."""
        return Path(f"{self._prefix}{snapshot_id}/block/mountpoint")

    def unpacked(self, snapshot_id: int) -> Path:
        """The image's files, if they had to be unpacked for want of a device."""
        return Path(f"{self._prefix}{snapshot_id}/block/unpacked")

    def writable(self, snapshot_id: int) -> Path:
        """The record of a writable device. The file exists if the snapshot has a device of its own."""
        return Path(f"{self._prefix}{snapshot_id}/block/{WRITABLE_NAME}")

    def backstore_mark(self, snapshot_id: int) -> Path:
        """A file with the path of a writable device, for tools of the original."""
        return Path(f"{self._prefix}{snapshot_id}/block/backstore_mark")

    def has_device(self, snapshot_id: int) -> bool:
        """Return True if the snapshot belongs to a container that writes to its own device."""
        return os.path.exists(f"{self._prefix}{snapshot_id}/block/{WRITABLE_NAME}")

    def is_image(self, snapshot_id: int) -> bool:
        """Return True if the snapshot is a layer of an overlaybd image."""
        return os.path.exists(self._config(snapshot_id))

    def new_directory(self, kind: Kind, owner: tuple[int, int] | None) -> Path:
        """Make a nameless snapshot directory; ``fs`` belongs to ``owner`` (uid, gid) if given."""
        directory = self.snapshots / os.path.basename(tempfile.mkdtemp(prefix=_NEW, dir=self.snapshots))
        try:
            _make(directory / "fs", 0o755)
            if owner is not None:
                os.chown(directory / "fs", *owner)
            if kind is Kind.ACTIVE:
                _make(directory / "work", 0o711)
        except BaseException:
            delete_tree(directory)
            raise
        return directory

    @staticmethod
    def add_block(directory: Path) -> Path:
        """Add the files of an image layer to a nameless directory; return its ``block``."""
        block = directory / "block"
        _make(block, 0o711)
        _make(block / "mountpoint", 0o711)
        (block / "init-debug.log").touch(mode=0o644)
        return block

    @staticmethod
    def write_image_reference(directory: Path, reference: str) -> None:
        """Note the image's reference in a nameless directory, if it is known."""
        if reference:
            (directory / "image_ref").write_text(reference)

    def adopt(self, directory: Path, snapshot_id: int) -> None:
        """Give a nameless directory its name. Deletes a leftover of a failed transaction under that name first."""
        target = self.directory(snapshot_id)
        if target.exists():
            self.delete(target)
        directory.rename(target)

    def delete(self, directory: Path) -> None:
        """Delete a directory. The next cleanup tries again to delete what is left of it."""
        delete_tree(directory)

    def unknown(self, known: Iterable[int]) -> list[Path]:
        """Return the directories without a snapshot: leftovers of crashes and of removals."""
        names = {str(snapshot_id) for snapshot_id in known}
        return sorted(path for path in self.snapshots.iterdir() if path.name not in names)

    def usage(self, snapshot_id: int) -> Usage:
        """Measure a snapshot's own files."""
        return disk_usage([self.fs(snapshot_id), self.block(snapshot_id)], skip="mountpoint")

    # A string, because Mounts asks this of every layer of a deep image: joining Paths took half of its time.
    def _config(self, snapshot_id: int) -> str:
        return f"{self._prefix}{snapshot_id}/block/{CONFIG_NAME}"

    def close(self) -> None:
        """Unlock the root for other processes. Closing twice is allowed."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def disk_usage(roots: Iterable[Path], *, skip: str = "") -> Usage:
    """Count inodes and allocated bytes below ``roots``, roots included, each inode once.

    Entries called ``skip`` directly below a root are left out; a missing root counts nothing.
    """
    linked: set[tuple[int, int]] = set()
    inodes = size = 0
    for root in roots:
        for status in statuses(root, skip=skip):
            # Only inodes with several names can come twice. The set stays small in containers with millions of files.
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity in linked:
                    continue
                linked.add(identity)
            inodes += 1
            size += status.st_blocks * 512
    return Usage(inodes, size)


def _make(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)  # mkdir's mode is subject to the umask


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    why = "another snapshotter uses this root"
    try:
        if try_lock(descriptor):
            return descriptor
    except OSError as error:
        why = f"cannot lock this root: {error.strerror}"
    os.close(descriptor)
    raise RootError(f"{path.parent}: {why}")
