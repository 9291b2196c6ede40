"""Extended attributes as ext4 stores them: in the free part of an inode, and in one block. Pure.

Source: kernel documentation, "ext4 Data Structures and Algorithms", extended attributes. ext4 stores POSIX ACLs in
another form than programs (and tars) see.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.blob import Buffer

Pair = tuple[bytes, bytes]

_MAGIC = 0xEA020000
_HEADER = struct.Struct("<4I16x")
_ENTRY = struct.Struct("<BBHIII")
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_ACLS = (2, 3)
_ACL_USER_OBJ, _ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP, _ACL_MASK, _ACL_OTHER = 1, 2, 4, 8, 16, 32
_MASK32 = 0xFFFFFFFF
# The kernel's limit (XATTR_SIZE_MAX).
_MOST_VALUE = 1 << 16


def split_name(name: bytes) -> tuple[int, bytes] | None:
    """Return (prefix number, rest) of an attribute's name; None for a name that ext4 does not store."""
    for index, prefix in _PREFIXES.items():
        if index in _ACLS:
            if name == prefix:
                return index, b""
        elif name.startswith(prefix) and len(name) > len(prefix):
            return index, name[len(prefix) :]
    return None


def place(pairs: Sequence[Pair], *, inline_space: int, block_size: int) -> tuple[bytes, bytes]:
    """Return the bytes for the inode and those for a block of its own; either may be empty.

    ``pairs`` have names accepted by :func:`split_name`, and values in disk form, in the order of placement. Raises
    OSError (E2BIG) if they do not fit.
    """
    if not pairs:
        return b"", b""
    entries = sorted(((*(split_name(name) or (0, b"")), value) for name, value in pairs), key=_order)
    inside, outside = [], []
    free = inline_space - 4 - 4  # the magic, and four zero bytes that end the list
    for entry in entries:
        need = _need(entry)
        if need <= free:
            inside.append(entry)
            free -= need
        else:
            outside.append(entry)
    inode = struct.pack("<I", _MAGIC) + _pack(inside, inline_space - 4, 0, hashed=False)[0] if inside else b""
    if not outside:
        return inode, b""
    if sum(map(_need, outside)) + 4 + _HEADER.size > block_size:
        raise OSError(errno.E2BIG, "extended attributes do not fit into one block")
    body, digest = _pack(outside, block_size - _HEADER.size, _HEADER.size, hashed=True)
    return inode, _HEADER.pack(_MAGIC, 1, 1, digest) + body


def parse_inline(tail: bytes, name: str = "") -> list[Pair]:
    """Read the attributes in an inode. Raises FormatError."""
    if len(tail) < 8 or struct.unpack_from("<I", tail)[0] != _MAGIC:
        return []
    return _parse(tail[4:], 0, 0, name)


def parse_block(raw: bytes | bytearray, name: str = "") -> list[Pair]:
    """Read the attributes in a block. Raises FormatError."""
    if struct.unpack_from("<I", raw)[0] != _MAGIC:
        raise FormatError("damaged block of extended attributes", blob=name)
    return _parse(bytes(raw), _HEADER.size, 0, name)


def _order(entry: tuple[int, bytes, bytes]) -> tuple[int, int, bytes]:
    return entry[0], len(entry[1]), entry[1]


def _need(entry: tuple[int, bytes, bytes]) -> int:
    _, name, value = entry
    return _ENTRY.size + _padded(len(name)) + _padded(len(value))


def _padded(length: int) -> int:
    return length + 3 & ~3


def _pack(entries: list[tuple[int, bytes, bytes]], size: int, base: int, *, hashed: bool) -> tuple[bytes, int]:
    # Entries from the front, values from the end; offsets count from `base` before the returned bytes.
    head, values = bytearray(), b""
    digest, countable = 0, True
    for index, name, value in entries:
        values = value.ljust(_padded(len(value)), b"\0") + values
        checksum = _entry_hash(name, value) if hashed else 0
        at = base + size - len(values) if value else 0
        head += _ENTRY.pack(len(name), index, at, 0, len(value), checksum) + name.ljust(_padded(len(name)), b"\0")
        countable &= checksum != 0
        digest = (digest << 16 & _MASK32) ^ (digest >> 16) ^ checksum
    return bytes(head).ljust(size - len(values), b"\0") + values, digest if countable else 0


def _entry_hash(name: bytes, value: bytes) -> int:
    found = 0
    for byte in name:
        found = (found << 5 & _MASK32) ^ (found >> 27) ^ byte
    for (word,) in struct.iter_unpack("<I", value.ljust(_padded(len(value)), b"\0")):
        found = (found << 16 & _MASK32) ^ (found >> 16) ^ word
    return found


def _parse(raw: bytes, first: int, base: int, blob: str) -> list[Pair]:
    found = []
    at = first
    while at + 4 <= len(raw) and raw[at : at + 4] != b"\0\0\0\0":
        if at + _ENTRY.size > len(raw):
            raise FormatError("extended attributes run over", blob=blob)
        name_length, index, offset, inode, size, _ = _ENTRY.unpack_from(raw, at)
        name = raw[at + _ENTRY.size : at + _ENTRY.size + name_length]
        value = raw[base + offset : base + offset + size]
        if len(name) != name_length or len(value) != size or inode:
            raise FormatError("extended attribute outside its block", blob=blob, got=(offset, size, inode))
        if index in _PREFIXES:
            found.append((_PREFIXES[index] + name, acl_from_disk(value, blob) if index in _ACLS else value))
        at += _ENTRY.size + _padded(name_length)
    return found


def acl_to_disk(value: Buffer, mode: int, *, default: bool) -> bytes | None:
    """Turn an ACL from programs' form into ext4's, with the basic entries of ``mode`` unless ``default``.

    Returns None if it grants no more than the mode does. Raises OSError (EINVAL) if it is malformed, and (E2BIG) if
    it is larger than any attribute can be.
    """
    raw = bytes(value)
    if len(raw) > _MOST_VALUE:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    if len(raw) < 4 or (len(raw) - 4) % 8 or struct.unpack_from("<I", raw)[0] != 2:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    entries = sorted(struct.iter_unpack("<HHI", raw[4:]), key=lambda entry: (entry[0], entry[2]))
    tags = [tag for tag, _, _ in entries]
    named = {_ACL_USER, _ACL_GROUP} & set(tags)
    once = all(tags.count(tag) == 1 for tag in (_ACL_USER_OBJ, _ACL_GROUP_OBJ, _ACL_OTHER))
    if not tags and default:
        return None
    if (
        not once
        or tags.count(_ACL_MASK) > 1
        or (named and _ACL_MASK not in tags)
        or any(p > 7 for _, p, _ in entries)
    ):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if not default and len(entries) == 3:
        return None
    packed = struct.pack("<I", 1)
    for tag, permissions, number in entries:
        if not default:
            permissions = _from_mode(tag, permissions, mode, masked=_ACL_MASK in tags)
        packed += struct.pack("<HH", tag, permissions)
        if tag in (_ACL_USER, _ACL_GROUP):
            packed += struct.pack("<I", number)
        elif tag not in (_ACL_USER_OBJ, _ACL_GROUP_OBJ, _ACL_MASK, _ACL_OTHER):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return packed


def _from_mode(tag: int, permissions: int, mode: int, *, masked: bool) -> int:
    # chmod changes the entries that represent the mode's bits.
    if tag == _ACL_USER_OBJ:
        return mode >> 6 & 7
    if tag == _ACL_OTHER:
        return mode & 7
    if tag == _ACL_MASK or (tag == _ACL_GROUP_OBJ and not masked):
        return mode >> 3 & 7
    return permissions


def acl_from_disk(value: bytes, blob: str = "") -> bytes:
    """Turn ext4's form of an ACL into the form programs see. Raises FormatError."""
    if len(value) < 4 or struct.unpack_from("<I", value)[0] != 1:
        raise FormatError("damaged ACL", blob=blob)
    packed = struct.pack("<I", 2)
    at = 4
    while at + 4 <= len(value):
        tag, permissions = struct.unpack_from("<HH", value, at)
        at += 4
        number = _MASK32
        if tag in (_ACL_USER, _ACL_GROUP):
            if at + 4 > len(value):
                raise FormatError("damaged ACL", blob=blob)
            number = struct.unpack_from("<I", value, at)[0]
            at += 4
        packed += struct.pack("<HHI", tag, permissions, number)
    return packed
