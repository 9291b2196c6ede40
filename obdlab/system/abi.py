"""Linux kernel constants: the FUSE wire, the loop device's ioctls, mount flags, and the system calls Python lacks.

From ``include/uapi/linux/{fuse,loop,fs,mount,prctl}.h``. Everything is in the machine's byte order.
"""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum, IntFlag
from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SECTOR = 512

#: inotify(7): written, attributes changed, closed after writing, moved, created or deleted, the watched directory too
IN_CHANGES = 0xFCE

# --- FUSE: requests and replies (linux/fuse.h, protocol 7.x) ---

FUSE_MAJOR = 7
#: The newest minor whose fields are used here (7.36: flags2; 7.28: max_pages).
FUSE_MINOR = 36
FUSE_ROOT_ID = 1
#: The kernel refuses to hand requests to a smaller read buffer.
FUSE_MIN_READ_BUFFER = 8192


class FuseOpcode(IntEnum):
    """Request kinds that the server answers, or must not answer."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43


class FuseInit(IntFlag):
    """Features agreed on in INIT."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    #: The kernel can hand out again requests that were taken and not answered (Linux 6.9).
    HAS_RESEND = 1 << 39


FOPEN_DIRECT_IO = 1 << 0
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FATTR_SIZE = 1 << 3

#: struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
FUSE_IN_HEADER = Struct("=IIQQIIIHH")
#: fuse_in_header with fuse_read_in or the head of fuse_write_in; only the fields a transfer needs: len, opcode,
#: unique, offset, size
FUSE_TRANSFER = Struct("=IIQ24x8xQI")
#: fuse_read_in and fuse_write_in have the same layout: fh, offset, size, flags, lock_owner, flags, padding
FUSE_TRANSFER_IN = Struct("=QQIIQII")
#: Where the data of a WRITE request begins.
FUSE_WRITE_DATA = FUSE_IN_HEADER.size + FUSE_TRANSFER_IN.size
#: struct fuse_out_header: len, error, unique
FUSE_OUT_HEADER = Struct("=IiQ")
#: struct fuse_notify_inval_inode_out: ino, off (negative: attributes only), len
FUSE_NOTIFY_INVAL_INODE_OUT = Struct("=Qqq")
#: Notifications have the code in fuse_out_header's error, and unique 0.
FUSE_NOTIFY_INVAL_INODE = 2
FUSE_NOTIFY_RESEND = 7
#: struct fuse_init_in: major, minor, max_readahead, flags (before 7.36 it ends here)
FUSE_INIT_IN = Struct("=IIII")
#: struct fuse_init_in: flags2, the field after those of 7.35
FUSE_INIT_FLAGS2_IN = Struct("=I")
#: struct fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write,
#: time_gran, max_pages, map_alignment, flags2, reserved
FUSE_INIT_OUT = Struct("=IIIIHHIIHHI28x")
#: struct fuse_attr: ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev,
#: blksize, flags
FUSE_ATTR = Struct("=QQQQQQIIIIIIIIII")
#: struct fuse_entry_out without its attr: nodeid, generation, entry_valid, attr_valid, both in nanoseconds
FUSE_ENTRY_OUT = Struct("=QQQQII")
#: struct fuse_attr_out without its attr: attr_valid, attr_valid_nsec, dummy
FUSE_ATTR_OUT = Struct("=QII")
#: struct fuse_setattr_in, its first field: valid
FUSE_SETATTR_IN = Struct("=I")
#: struct fuse_open_out: fh, open_flags, backing_id
FUSE_OPEN_OUT = Struct("=QIi")
#: struct fuse_write_out: size, padding
FUSE_WRITE_OUT = Struct("=II")
#: struct fuse_statfs_out: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding and spare
FUSE_STATFS_OUT = Struct("=QQQQQIII28x")
#: struct fuse_fallocate_in: fh, offset, length, mode, padding
FUSE_FALLOCATE_IN = Struct("=QQQII")
#: struct fuse_dirent without its name: ino, off, namelen, type
FUSE_DIRENT = Struct("=QQII")

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# --- loop devices (linux/loop.h) ---

LOOP_MAJOR = 7
LOOP_CLR_FD = 0x4C01
LOOP_GET_STATUS64 = 0x4C05
LOOP_CHANGE_FD = 0x4C06
LOOP_SET_CAPACITY = 0x4C07
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
#: Makes a block device read-only or not, by the int pointed to (linux/fs.h).
BLKROSET = 0x125D

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16


class LoopInfo64(ctypes.Structure):
    """struct loop_info64."""

    _fields_ = (
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * 64),
        ("lo_crypt_name", ctypes.c_char * 64),
        ("lo_encrypt_key", ctypes.c_uint8 * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    )


class LoopConfig(ctypes.Structure):
    """struct loop_config."""

    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", LoopInfo64),
        ("reserved", ctypes.c_uint64 * 8),
    )


# --- calls that Python does not have ---

MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
_MS_REC = 1 << 14
_MS_SLAVE = 1 << 19
_CLONE_NEWNS = 0x20000
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOATIME = 0x10

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_IO_FLUSHER = 57

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# Added to all architectures at once, in Linux 5.2 and later, so all architectures use the same numbers.
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_OPENAT2 = 437
_SYS_PIDFD_GETFD = 438

# struct open_how (include/uapi/linux/openat2.h): flags, mode, resolve
_OPEN_HOW = Struct("<QQQ")
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_OPEN_TRIES = 10_000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p,) * 3 + (ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.prctl.argtypes = (ctypes.c_int,) + (ctypes.c_ulong,) * 4


def mount(source: str, target: Path, fs_type: str, flags: int, options: str) -> None:
    """mount(2). Raises OSError with the target as its file name."""
    answer = _libc.mount(os.fsencode(source), os.fsencode(target), fs_type.encode(), flags, os.fsencode(options))
    _check(answer, target)


def own_mounts() -> None:
    """Give this thread, and processes it starts from now on, a mount namespace of its own.

    Mounts made in it are neither seen nor copied elsewhere.

    Raises OSError.
    """
    _check(_libc.unshare(_CLONE_NEWNS), None)
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None), None)


def umount2(target: Path, flags: int = 0) -> None:
    """umount2(2). Raises OSError with the target as its file name."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def mount_detached(fs_type: str, options: Mapping[str, str | None], attributes: int) -> int:
    """Mount a file system nowhere: return a descriptor of its root directory (fsopen(2), fsconfig(2), fsmount(2)).

    No other process finds it, copies it with a mount namespace, or has to unmount it. It ends with the last file open
    in it. An option without a value is a flag. Raises OSError.
    """
    context = _syscall(_SYS_FSOPEN, fs_type.encode(), FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            if value is None:
                _syscall(_SYS_FSCONFIG, context, FSCONFIG_SET_FLAG, key.encode(), None, 0)
            else:
                _syscall(_SYS_FSCONFIG, context, FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
        _syscall(_SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(_SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def open_in_root(root: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open ``path`` as a process whose root is the directory ``root`` would (openat2(2), Linux 5.6).

    Neither ".." nor links, absolute ones included, lead out of it, also if they change meanwhile. Raises OSError.
    """
    how = ctypes.create_string_buffer(
        _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS), _OPEN_HOW.size
    )
    # Where a name has "..", any rename or mount on the system meanwhile makes the kernel ask for another try.
    for _ in range(_OPEN_TRIES):
        try:
            return _syscall(_SYS_OPENAT2, root, path or b".", ctypes.addressof(how), _OPEN_HOW.size)
        except BlockingIOError:
            os.sched_yield()
    return _syscall(_SYS_OPENAT2, root, path or b".", ctypes.addressof(how), _OPEN_HOW.size)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Return a duplicate of another process's file descriptor (pidfd_getfd(2), Linux 5.6). Raises OSError."""
    return _syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)


# Variadic: pass every number as wide as a register.
def _syscall(number: int, *arguments: int | bytes | None) -> int:
    wide = [ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each) for each in arguments]
    answer: int = _libc.syscall(ctypes.c_long(number), *wide)
    if answer < 0:
        _check(answer, None)
    return answer


def inotify_init() -> int:
    """inotify_init1(2): return a descriptor that becomes readable when what it watches changes. Raises OSError."""
    descriptor: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        _check(descriptor, None)
    return descriptor


def inotify_add_watch(descriptor: int, path: Path, mask: int) -> None:
    """inotify_add_watch(2). Raises OSError."""
    if _libc.inotify_add_watch(descriptor, os.fsencode(path), mask) < 0:
        _check(-1, path)


def prctl(option: int, value: int) -> None:
    """prctl(2) with one number. Raises OSError."""
    _check(_libc.prctl(option, value, 0, 0, 0), None)


def keep_freed_memory(size: int = 8 << 20) -> None:
    """Have the C library keep up to ``size`` bytes of freed memory instead of returning them to the kernel.

    Without this, a server that answers reads of 1 MiB faults its buffers in again for most of them, a third of their
    cost. Does nothing where the C library has no mallopt(3).
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, size)
        mallopt(_M_MMAP_THRESHOLD, size)


def set_process_name(name: str) -> None:
    """Name this process (15 bytes at most are kept) for ps and /proc/PID/comm."""
    text = ctypes.create_string_buffer(os.fsencode(name)[:15])
    _check(_libc.prctl(PR_SET_NAME, ctypes.addressof(text), 0, 0, 0), None)


def _check(answer: int, target: Path | None) -> None:
    if answer != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), None if target is None else str(target))
