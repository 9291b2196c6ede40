"""A member of a tar, and a fast parser for plain headers.

Most members of most layers have one plain header, and layers have tens of thousands of members. :func:`plain_member`
reads such headers at a fraction of tarfile's cost. All others (pax and GNU extensions, base-256 numbers, device
nodes, odd or damaged headers) are left to :mod:`obdlab.convert.tar.reader`.

Source: POSIX.1-2024 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from zlib import adler32

#: Unit of a tar: headers are one block, content is padded to whole ones.
BLOCK = 512
#: Bounds of signed 64-bit nanoseconds; times outside become 0, as in containerd.
MAX_TIME_NS = (1 << 63) - 1
_NS = 1_000_000_000

# name, mode + uid + gid, size, mtime, checksum, type, link, magic and version, (user, group, device), prefix
_HEADER = struct.Struct("100s24s12s12s8s1s100s8s80x155s12x")
_POSIX, _GNU = b"ustar\x0000", b"ustar  \0"
_EMPTY_PREFIX = bytes(155)
# Mode and owner repeat from member to member: this caches their numbers by the 24 bytes they are written in.
_MOST_OWNERS = 4096
_owners: dict[bytes, tuple[int, int, int]] = {}


class Kind(Enum):
    """Type of a member."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"


_KINDS = {b"0": Kind.FILE, b"5": Kind.DIRECTORY, b"2": Kind.SYMLINK, b"1": Kind.HARDLINK}
_FILE, _DIRECTORY = Kind.FILE, Kind.DIRECTORY


# Not frozen: frozen ones take four times as long to make, and there is one for every file.
@dataclass(slots=True)
class Member:
    """One member. Names are bytes as written, not yet checked for escapes."""

    name: bytes
    kind: Kind
    #: Permission bits with setuid, setgid and sticky.
    mode: int
    uid: int
    gid: int
    #: Bytes of a file.
    size: int
    mtime_ns: int
    atime_ns: int
    link: bytes
    #: (major, minor) of a device node.
    rdev: tuple[int, int]
    xattrs: tuple[tuple[bytes, bytes], ...]
    #: Offset of the member's header in the uncompressed stream.
    offset: int
    sparse: bool


def plain_member(header: bytes, offset: int) -> Member | None:
    """Read the header block at ``offset`` of its stream.

    Returns None unless it is a sound plain header of a file, directory or link; never raises.
    """
    name, owner, size_field, mtime_field, checksum, kind_field, link, magic, prefix = _HEADER.unpack(header)
    kind = _KINDS.get(kind_field)
    if kind is None or not (magic == _POSIX or (magic == _GNU and prefix == _EMPTY_PREFIX)):
        return None
    try:
        numbers = _owners.get(owner) or _read_owner(owner)
        size, mtime = int(size_field.rstrip(b"\0 "), 8), int(mtime_field.rstrip(b"\0 "), 8)
        wanted = int(checksum.rstrip(b"\0 "), 8)
    except ValueError:
        return None
    if size < 0 or mtime < 0 or wanted != _sum(header, checksum):
        return None
    name = name.partition(b"\0")[0]
    if prefix != _EMPTY_PREFIX and (front := prefix.partition(b"\0")[0]):
        name = front + b"/" + name
    if kind is _DIRECTORY:
        name = name.rstrip(b"/")
    mtime_ns = mtime * _NS if mtime * _NS <= MAX_TIME_NS else 0
    mode, uid, gid = numbers
    return Member(
        name, kind, mode, uid, gid, size if kind is _FILE else 0, mtime_ns, mtime_ns,
        link.partition(b"\0")[0], (0, 0), (), offset, False,
    )  # fmt: skip


def plain_size(header: bytes) -> int | None:
    """Return the size field of a header block of any type; None if the block is not plain and sound."""
    _, _, size_field, _, checksum, _, _, magic, _ = _HEADER.unpack(header)
    try:
        size, wanted = int(size_field.rstrip(b"\0 "), 8), int(checksum.rstrip(b"\0 "), 8)
    except ValueError:
        return None
    return size if size >= 0 and magic in (_POSIX, _GNU) and wanted == _sum(header, checksum) else None


def _read_owner(field: bytes) -> tuple[int, int, int]:
    # Mode, user and group. Raises ValueError unless all are plain numbers.
    mode, uid, gid = (int(field[at : at + 8].rstrip(b"\0 "), 8) for at in (0, 8, 16))
    if min(mode, uid, gid) < 0:
        raise ValueError("negative")
    if len(_owners) >= _MOST_OWNERS:
        _owners.clear()
    _owners[field] = found = (mode & 0o7777, uid, gid)
    return found


def _sum(header: bytes, checksum: bytes) -> int:
    # The sum of all bytes, with the checksum field counted as blanks. The low half of Adler-32 is a sum modulo 65521,
    # which 256 bytes do not reach; it starts at 1.
    halves = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
    return halves - sum(checksum) + 8 * 32
