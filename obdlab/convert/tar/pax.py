"""Pax headers: records beside a plain header, read strictly.

tarfile stops at a malformed record and continues as if there had been none; another reader of the same layer may then
see another image. Here every record must be well-formed. All keywords that layers use are handled here; sparse files
are left to tarfile.

Source: POSIX.1-2024 pax, "pax Header Block" and "Extended Header Keywords".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from obdlab.convert.tar.member import MAX_TIME_NS, Kind, plain_size

if TYPE_CHECKING:
    from obdlab.convert.tar.member import Member

_NS = 1_000_000_000
_XATTR_PREFIX = b"SCHILY.xattr."
_SPARSE_PREFIX = b"GNU.sparse."
_TIME = re.compile(r"(-?)(\d{1,18})(?:\.(\d*))?", re.ASCII)
_NUMBER = re.compile(rb"\d{1,19}")
_NUMBERS = (b"size", b"uid", b"gid")
_NAMES = (b"path", b"linkpath", b"uname", b"gname")
_SHORTEST = 5  # "5 a=\n"


def pax_size(header: bytes) -> int | None:
    """Return the length of the records that follow, if this is a pax header block."""
    return plain_size(header) if header[156:157] == b"x" else None


def parse_records(body: bytes) -> dict[bytes, bytes]:
    """Return the value of each keyword, the last one if repeated. Raises ValueError for a malformed record."""
    found: dict[bytes, bytes] = {}
    at, end = 0, len(body)
    while at < end:
        blank = body.find(b" ", at, at + 20)
        digits = body[at:blank] if blank > 0 else b""
        if not digits.isdigit():
            raise ValueError("record without a length")
        following = at + int(digits)
        if not at + _SHORTEST <= following <= end or body[following - 1] != 0x0A:
            raise ValueError(f"record with a wrong length ({int(digits)})")
        key, sign, value = body[blank + 1 : following - 1].partition(b"=")
        if not key or not sign or b"\0" in key:
            raise ValueError("record without a keyword")
        if (key in _NAMES and b"\0" in value) or (key in _NUMBERS and value and not _NUMBER.fullmatch(value)):
            raise ValueError(f"{key.decode()} is {value[:40]!r}" + (", with a NUL" if b"\0" in value else ""))
        found[key] = value
        at = following
    return found


def merged(member: Member, records: dict[bytes, bytes]) -> Member | None:
    """Return the member with the records' values, not yet checked; None if they describe a sparse file."""
    xattrs = []
    for key, value in records.items():
        if key.startswith(_XATTR_PREFIX):
            xattrs.append((key[len(_XATTR_PREFIX) :], value))
        elif key.startswith(_SPARSE_PREFIX):
            return None
        elif not value:
            continue  # an empty value removes the record
        elif key == b"path":
            member.name = value.rstrip(b"/")
        elif key == b"linkpath":
            member.link = value
        elif key == b"uid":
            member.uid = int(value)
        elif key == b"gid":
            member.gid = int(value)
        elif key == b"size" and member.kind is Kind.FILE:
            member.size = int(value)
    member.xattrs = tuple(xattrs)
    mtime, atime = records.get(b"mtime"), records.get(b"atime")
    if mtime is not None:
        member.mtime_ns = time_ns(mtime.decode("latin-1"))
    member.atime_ns = max(time_ns(atime.decode("latin-1")) if atime else 0, member.mtime_ns)
    return member


def time_ns(text: str) -> int:
    """Return a pax time in nanoseconds; 0 if it is malformed or out of range, as in containerd."""
    match = _TIME.fullmatch(text)
    if match is None or match[1]:
        return 0
    value = int(match[2]) * _NS + int((match[3] or "")[:9].ljust(9, "0"))
    return value if value <= MAX_TIME_NS else 0
