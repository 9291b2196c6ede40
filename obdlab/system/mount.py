"""Mounts file systems of block devices; lists mounts and the processes that hold them."""

from __future__ import annotations

import errno
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from obdlab.errors import DeviceError
from obdlab.system import abi, superblock

_OCTAL = re.compile(r"\\([0-7]{3})")

# ext4 superblock (fs/ext4/ext4.h): 1024 bytes in; s_feature_incompat at 0x60
_EXT4_INCOMPAT_AT = 1024 + 0x60
_EXT4_NEEDS_RECOVERY = 0x4
# Options that mount(2) takes as flags, not as text for the file system.
_FLAGS = {
    "rw": 0,
    "ro": abi.MS_RDONLY,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "sync": 16,
    "dirsync": 128,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
    "strictatime": 1 << 24,
    "lazytime": 1 << 25,
}
#: For images beside the host's own files: nodev, nosuid. An overlay over such a mount has neither.
MS_IMAGE = _FLAGS["nodev"] | _FLAGS["nosuid"]
#: The reaction of an ext4 to an error.
ERRORS = "errors=remount-ro"
_SKIP_LOG = ("noload", "norecovery")
# Errors of mount(2) on a device that cannot be written to, when mounting for writing.
_READ_ONLY = (errno.EACCES, errno.EROFS)
_U32 = Struct("<I")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/PID/mountinfo."""

    mount_id: int
    parent_id: int
    #: "major:minor" of the mounted file system's device.
    device: str
    mountpoint: Path
    fs_type: str
    source: str
    super_options: str


def parse_mountinfo(text: str) -> list[MountEntry]:
    """Parse /proc/PID/mountinfo (proc_pid_mountinfo(5)), oldest mount first."""
    # Lines end in "\n" alone: a name may hold other characters that Python takes for line ends.
    return [_parse_line(line) for line in text.removesuffix("\n").split("\n")]


def _parse_line(line: str) -> MountEntry:
    left, _, right = line.partition(" - ")
    try:
        mount_id, parent_id, device, _root, mountpoint, *_ = left.split(" ")
        fs_type, source, super_options = right.split(" ", 2)
        return MountEntry(
            int(mount_id),
            int(parent_id),
            device,
            Path(_unescape(mountpoint)),
            fs_type,
            _unescape(source),
            _unescape(super_options),
        )
    except ValueError:
        raise DeviceError(f"mountinfo: a line that is none (got {line!r})") from None


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def escape(text: str) -> str:
    """Escape a name as mountinfo does."""
    return "".join(f"\\{ord(each):03o}" if each in " \t\n\\#" else each for each in text)


def mounts() -> list[MountEntry]:
    """Return this process's mounts, oldest first."""
    # Names of mounts may hold any bytes; bytes that are not UTF-8 become surrogates, as in all of Python's paths.
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape"))


def mounts_at(target: Path) -> list[MountEntry]:
    """Return the mounts on ``target``, an absolute resolved path, without touching it; the last one is on top."""
    return [entry for entry in mounts() if entry.mountpoint == target]


def mount_at(target: Path) -> MountEntry | None:
    """Return the topmost mount on ``target``, or None. Never touches the mounted file system itself."""
    entries = mounts_at(_resolved(target))
    return entries[-1] if entries else None


def is_mounted(target: Path) -> bool:
    """Return True if a file system is mounted on ``target``. Never touches the mounted file system itself."""
    return mount_at(target) is not None


def mounts_of(device: Path) -> list[MountEntry]:
    """Return this mount namespace's mounts of a block device's, or a file's, file system."""
    try:
        number = os.stat(device).st_rdev
    except FileNotFoundError:
        number = 0
    if not number:  # a file is found by its path alone
        return [entry for entry in mounts() if entry.source == str(device)]
    name = f"{os.major(number)}:{os.minor(number)}"
    return [entry for entry in mounts() if entry.device == name]


# The last component may be a dead mount that would not answer, so only its parent is resolved.
def _resolved(target: Path) -> Path:
    target = Path(os.path.abspath(target))
    return target.parent.resolve() / target.name if target.name else target


def detect_fs(device: Path) -> tuple[str, bool]:
    """Return the type of the device's file system (ext4, erofs or xfs) and whether its journal wants replaying.

    Raises DeviceError if the superblock cannot be read, is of an unknown type, or has features that are unsafe in an
    untrusted image (:mod:`obdlab.system.superblock`): every file system passes this check before its mount.
    """
    try:
        with device.open("rb", buffering=0) as stream:
            head = stream.read(superblock.SUPERBLOCK_END)
    except OSError as error:
        raise DeviceError(f"{device}: cannot read the superblock: {error.strerror}") from error
    kind = superblock.kind_of(head)
    if not kind:
        raise DeviceError(f"{device}: no ext4, erofs or xfs file system in it (no superblock of theirs found)")
    trouble = superblock.trouble_of(kind, head)
    if trouble:
        raise DeviceError(f"{device}: {kind} is not given to the kernel: it has {trouble}")
    wants_replay = kind == "ext4" and bool(_U32.unpack_from(head, _EXT4_INCOMPAT_AT)[0] & _EXT4_NEEDS_RECOVERY)
    return kind, wants_replay


def mount(
    device: Path,
    target: Path,
    *,
    read_only: bool,
    fs_type: str | None = None,
    options: str = "",
    flags: int = 0,
    tries: int = 3,
) -> str:
    """Mount the device's file system on ``target``, which must exist; return the type of the file system.

    The type is detected unless given. On a read-only device, an ext4 whose journal was not replayed is mounted with
    ``noload``, an xfs with ``norecovery``. On other devices both are left out even if ``options`` name them: the
    skipped log would be replayed later, over newer blocks. An ext4 always gets ``errors=remount-ro``: an image or its
    ``options`` must not be able to choose the kernel's panic. A ``read_only`` mount is an image beside the host's own
    files, for an overlay or to look at: devices and setuid bits in it have no effect. A device that is busy for a
    moment is tried ``tries`` times. Raises DeviceError, also for an EROFS to be mounted writable.
    """
    detected, needs_recovery = detect_fs(device)
    fs_type = fs_type or detected
    if fs_type == "erofs" and not read_only:
        raise DeviceError(f"{device}: EROFS cannot be written to (wanted an image of another file system)")
    skips_log = read_only and _is_read_only(device)
    words = [word for word in options.split(",") if word and word not in _SKIP_LOG]
    extra = [word for word in words if word not in _FLAGS]
    for word in words:
        flags |= _FLAGS.get(word, 0)
    if skips_log and fs_type == "ext4" and needs_recovery:
        extra.append("noload")
    if fs_type == "ext4":
        extra.append(ERRORS)  # the last one counts
    if read_only and fs_type == "xfs":
        extra.append("norecovery,nouuid" if skips_log else "nouuid")
    all_flags = flags | (abi.MS_RDONLY | MS_IMAGE if read_only else 0)
    for attempt in range(1, tries + 1):
        try:
            abi.mount(str(device), target, fs_type, all_flags, ",".join(extra))
        except OSError as error:
            if error.errno != errno.EBUSY or attempt == tries:
                cause = "the device is read-only" if error.errno in _READ_ONLY else error.strerror
                raise DeviceError(f"cannot mount {device} ({fs_type}) on {target}: {cause}") from error
            time.sleep(0.05 * attempt)
        else:
            break
    return fs_type


def _is_read_only(device: Path) -> bool:
    try:
        number = os.stat(device).st_rdev
        return (
            not number or Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/ro").read_text().strip() == "1"
        )
    except OSError:
        return False


def bind(source: Path, target: Path, *, read_only: bool) -> None:
    """Mount the file system at ``source`` on ``target`` as well. Raises DeviceError."""
    try:
        abi.mount(str(source), target, "", abi.MS_BIND, "")
        if read_only:
            abi.mount("", target, "", abi.MS_BIND | abi.MS_REMOUNT | abi.MS_RDONLY, "")
    except OSError as error:
        raise DeviceError(f"cannot mount {source} on {target} as well: {error.strerror}") from error


def unmount(target: Path, *, lazy: bool = False) -> bool:
    """Unmount the topmost mount of ``target``. Return False if nothing was mounted there.

    Raises DeviceError if it is busy, naming the processes and mounts that hold it. ``lazy`` lets it go while busy.
    """
    target = _resolved(target)
    if not mounts_at(target):
        return False
    try:
        abi.umount2(target, abi.UMOUNT_NOFOLLOW | (abi.MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno == errno.EINVAL:  # gone meanwhile
            return False
        if error.errno == errno.EBUSY:
            users = holders(target) or ["no process of this mount namespace: a container's, perhaps"]
            raise DeviceError(f"{target}: busy, held by {'; '.join(users)}") from error
        raise DeviceError(f"{target}: cannot unmount: {error.strerror}") from error
    return True


def holders(target: Path, *, most: int = 8) -> list[str]:
    """Return texts naming the holders of the mount on ``target``: processes with open files, and other mounts."""
    found = [
        f"mount {entry.mountpoint} ({entry.fs_type})"
        for entry in mounts()
        if target in entry.mountpoint.parents or _names(entry.super_options, target)
    ]
    for process in Path("/proc").glob("[0-9]*"):
        if len(found) >= most:
            found.append("...")
            break
        if any(_below(link, target) for link in _links_of(process)):
            found.append(f"process {process.name} ({_name_of(process)})")
    return found


def _names(super_options: str, target: Path) -> bool:
    return any(
        _below(directory, target)
        for option in super_options.split(",")
        if option.startswith(("lowerdir=", "upperdir=", "workdir=", "lowerdir+="))
        for directory in option.partition("=")[2].split(":")
    )


# Reads the links only: following one would ask the file system, which may be dead.
def _links_of(process: Path) -> list[str]:
    links = []
    for name in ("cwd", "root", "exe"):
        try:
            links.append(os.readlink(process / name))
        except OSError:  # ended meanwhile, or a kernel thread
            continue
    try:
        numbers = os.listdir(process / "fd")
    except OSError:
        return links
    for number in numbers:
        try:
            links.append(os.readlink(process / "fd" / number))
        except OSError:  # closed meanwhile
            continue
    return links


def _below(path: str, target: Path) -> bool:
    text = str(target)
    return path == text or path.startswith(text + "/")


def _name_of(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "?"
