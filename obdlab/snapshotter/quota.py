"""Disk quota of containers: a project quota on the directories that an overlay writes to.

Each container has its own project id, and so its own limit. The id is set on the directory (``chattr -p``) and
inherited by new files in it; the limit is set on the file system (``setquota -P``). That needs ext4 or xfs mounted
with ``prjquota``.

(Linux include/uapi/linux/fs.h, struct fsxattr; include/uapi/linux/quota.h, struct if_dqblk; quotactl_fd(2).)
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import struct
import threading
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

LABEL_QUOTA = "containerd.io/snapshot/disk_quota"

_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820  # FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
_ATTRIBUTES = struct.Struct("=IIIII8s")  # flags, extent size, extents, project, copy-on-write extent size
_INHERIT = 0x200  # FS_XFLAG_PROJINHERIT
_QUOTACTL_FD = 443
_GET, _SET, _PROJECTS = 0x800007, 0x800008, 2  # Q_GETQUOTA, Q_SETQUOTA, PRJQUOTA
_LIMITS = struct.Struct(
    "=QQQQQQQQI4x"
)  # blocks: hard, soft, used; inodes: hard, soft, used; two times; bits of the valid fields
_BLOCK_LIMITS = 1  # QIF_BLIMITS
_BLOCK = 1024
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([bkmgtp]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
#: The original's single project id is there, too.
_FIRST_PROJECT = 1 << 24
_TRIES = 1000


class QuotaError(ObdlabError):
    """The file system cannot limit a directory, or not to this size."""


def parse_size(text: str) -> int:
    """Read a size such as ``20g`` (powers of 1024). Raises InvalidArgumentError."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if size < _BLOCK:
        raise InvalidArgumentError(f"not a quota (got {text!r}, wanted a size of at least 1k, as in 20g)")
    return size


def quota_asked(labels: Mapping[str, str], default_bytes: int) -> int:
    """Return the limit, in bytes, that a container's labels or the configuration ask for; 0 for none.

    The smaller one counts: a label may come from a pod, and must not raise the limit of its host.
    """
    text = labels.get(LABEL_QUOTA, "")
    if not text:
        return default_bytes
    try:
        asked = parse_size(text)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"label {LABEL_QUOTA}: {error}") from error
    return min(asked, default_bytes) if default_bytes else asked


class Quotas:
    """The project quotas of the file system of ``directory``. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()

    def check(self, size: int) -> None:
        """Raise QuotaError unless the file system can limit a directory to ``size`` bytes."""
        self._limits(_FIRST_PROJECT)
        total = os.statvfs(self._directory)
        if size > total.f_blocks * total.f_frsize:
            raise QuotaError(
                f"{self._directory}: quota is larger than the file system "
                f"(got {size} bytes, wanted at most {total.f_blocks * total.f_frsize})"
            )

    def limit(self, directories: Sequence[Path], snapshot_id: int, size: int) -> int:
        """Limit new, empty directories together to ``size`` bytes; return their project id.

        Raises FailedPreconditionError if the file system cannot do it.
        """
        try:
            self.check(size)
            with self._lock:
                project = self._free_project(snapshot_id)
                for directory in directories:
                    _set_project(directory, project)
                self._set_limit(project, size)
        except QuotaError as error:
            raise FailedPreconditionError(f"disk quota: {error}") from error
        return project

    def forget(self, project: int) -> None:
        """Remove a project's limit; never raises."""
        try:
            self._set_limit(project, 0)
        except QuotaError as error:
            logger.warning("%s", error)

    @staticmethod
    def project_of(directory: Path) -> int:
        """Return the project that limits a directory, 0 for a directory without limit."""
        try:
            project = _attributes(directory)[3]
        except OSError:
            return 0
        return project if project >= _FIRST_PROJECT else 0

    # Ids of snapshots are unique in a root, but a file system may hold several roots.
    def _free_project(self, snapshot_id: int) -> int:
        for number in range(_TRIES):
            project = _FIRST_PROJECT + (snapshot_id + number * 65_537) % (1 << 31)
            limits = self._limits(project)
            if not any(limits[:6]):
                return project
        raise QuotaError(f"{self._directory}: no free project id found in {_TRIES} tries")

    def _limits(self, project: int) -> tuple[int, ...]:
        buffer = ctypes.create_string_buffer(_LIMITS.size)
        try:
            self._control(_GET, project, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH) and self._enforced():  # xfs, for an id without quota so far
                return (0,) * 6
            raise QuotaError(
                f"{self._directory}: the file system keeps no project quota: {error.strerror} "
                "(wanted ext4 with the features quota and project, or xfs, mounted with prjquota)"
            ) from error
        if not self._enforced():
            raise QuotaError(f"{self._directory}: project quota is not enforced (wanted the mount option prjquota)")
        return _LIMITS.unpack(buffer.raw)

    def _enforced(self) -> bool:
        from obdlab.system import mount

        device = self._directory.stat().st_dev
        numbers = f"{os.major(device)}:{os.minor(device)}"
        options = next((entry.super_options for entry in mount.mounts() if entry.device == numbers), "")
        return not {"prjquota", "pquota"}.isdisjoint(options.split(","))

    def _set_limit(self, project: int, size: int) -> None:
        blocks = -(-size // _BLOCK)
        buffer = ctypes.create_string_buffer(_LIMITS.pack(blocks, 0, 0, 0, 0, 0, 0, 0, _BLOCK_LIMITS))
        try:
            self._control(_SET, project, buffer)
        except OSError as error:
            raise QuotaError(
                f"{self._directory}: cannot set the limit of project {project} ({error.strerror})"
            ) from error

    def _control(self, command: int, project: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            whole = ctypes.c_uint(command << 8 | _PROJECTS)
            if (
                libc.syscall(ctypes.c_long(_QUOTACTL_FD), ctypes.c_uint(fd), whole, ctypes.c_int(project), buffer)
                != 0
            ):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(fd)


def _attributes(directory: Path) -> tuple[int, ...]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return _ATTRIBUTES.unpack(fcntl.ioctl(fd, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size)))
    finally:
        os.close(fd)


def _set_project(directory: Path, project: int) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = list(_ATTRIBUTES.unpack(fcntl.ioctl(fd, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size))))
        found[0] |= _INHERIT
        found[3] = project
        fcntl.ioctl(fd, _SET_ATTRIBUTES, _ATTRIBUTES.pack(*found))
    except OSError as error:
        raise QuotaError(f"{directory}: cannot be given a project id ({error.strerror})") from error
    finally:
        os.close(fd)
