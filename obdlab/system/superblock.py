"""The type of a file system, and which superblock features of an untrusted one are safe to give to the kernel.

The lists hold the features that mkfs of obdlab, of the original and of today's distributions writes by default, and
those that run no extra kernel code. Everything else is refused: it would have the kernel open other devices, take
options from the image, or parse structures that few images have and few people test.

Sources: the superblocks of ext4 (fs/ext4/ext4.h), EROFS (fs/erofs/erofs_fs.h) and XFS (fs/xfs/libxfs/xfs_format.h).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_U16 = Struct("<H")
_U32 = Struct("<I")
_BE16 = Struct(">H")
_BE32 = Struct(">I")
_BE64 = Struct(">Q")

#: Bytes of a file system that hold its superblock, for any type.
SUPERBLOCK_END = 4096
#: fs/ext4/ext4.h, s_magic; fs/erofs/erofs_fs.h, magic.
EXT4_MAGIC, EROFS_MAGIC = 0xEF53, 0xE0F5E1E2
_EXT4_MAGIC_AT, _EROFS_MAGIC_AT = 1024 + 0x38, 1024

_EXT4 = 1024
_EXT4_COMPAT_AT, _EXT4_INCOMPAT_AT, _EXT4_RO_COMPAT_AT = _EXT4 + 0x5C, _EXT4 + 0x60, _EXT4 + 0x64
_EXT4_JOURNAL_DEV_AT, _EXT4_MOUNT_OPTIONS_AT, _EXT4_MOUNT_OPTIONS_SIZE = _EXT4 + 0xE4, _EXT4 + 0x200, 64
# has_journal ext_attr resize_inode dir_index sparse_super2 stable_inodes orphan_file; dir_prealloc, imagic_inodes and
# the two "exclude" ones mean nothing to the kernel
_EXT4_COMPAT = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x80 | 0x100 | 0x200 | 0x800 | 0x1000
# filetype needs_recovery meta_bg (growing in use sets it) extent 64bit flex_bg metadata_csum_seed
_EXT4_INCOMPAT = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x200 | 0x2000
# sparse_super large_file huge_file uninit_bg dir_nlink extra_isize metadata_csum read-only project orphan_present
_EXT4_RO_COMPAT = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40 | 0x400 | 0x1000 | 0x2000 | 0x10000
_EXT4_NAMES: Mapping[str, Mapping[int, str]] = {
    "compatible": {0x400: "fast_commit"},
    "incompatible": {
        0x1: "compression",
        0x8: "journal_dev",
        0x100: "mmp",
        0x400: "ea_inode",
        0x1000: "dirdata",
        0x4000: "large_dir",
        0x8000: "inline_data",
        0x10000: "encrypt",
        0x20000: "casefold",
    },
    "read-only compatible": {0x100: "quota", 0x200: "bigalloc", 0x4000: "shared_blocks", 0x8000: "verity"},
}

_EROFS = 1024
_EROFS_INCOMPAT_AT, _EROFS_EXTRA_DEVICES_AT = _EROFS + 80, _EROFS + 86
# LZ4 with padding in front; chunked files
_EROFS_INCOMPAT = 0x1 | 0x4
_EROFS_NAMES = {
    0x2: "other compression than LZ4, or large clusters",
    0x8: "device table, or a second compression",
    0x10: "tails packed into compressed indexes",
    0x20: "fragments or deduplication",
    0x40: "long extended attribute prefixes",
    0x80: "48-bit addresses",
    0x100: "metadata box",
}

_XFS_RT_BLOCKS_AT, _XFS_LOG_START_AT, _XFS_VERSION_AT = 16, 48, 100
_XFS_RO_COMPAT_AT, _XFS_INCOMPAT_AT, _XFS_LOG_INCOMPAT_AT = 212, 216, 220
# finobt rmapbt reflink inobtcount
_XFS_RO_COMPAT = 0x1 | 0x2 | 0x4 | 0x8
# ftype sparse_inodes meta_uuid bigtime nrext64 exchange_range parent
_XFS_INCOMPAT = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_XFS_LOG_INCOMPAT = 0x1  # extended attributes


def kind_of(head: bytes) -> str:
    """Return the type of the file system whose first SUPERBLOCK_END bytes are ``head``; '' if the type is unknown.

    The tools that read images in user space and the mounts agree by it, also about a disk with two magic numbers.
    """
    if len(head) < SUPERBLOCK_END:
        return ""
    if _U16.unpack_from(head, _EXT4_MAGIC_AT)[0] == EXT4_MAGIC:
        return "ext4"
    if _U32.unpack_from(head, _EROFS_MAGIC_AT)[0] == EROFS_MAGIC:
        return "erofs"
    return "xfs" if head[:4] == b"XFSB" else ""


def trouble_of(fs_type: str, head: bytes) -> str:
    """Return the features of a file system that are unsafe in an untrusted image, as text, or ''.

    ``head`` are its first 4096 bytes; ``fs_type`` is ``ext4``, ``erofs`` or ``xfs``.
    """
    found = {"ext4": _ext4, "erofs": _erofs, "xfs": _xfs}[fs_type](head)
    return ", ".join(found)


def _ext4(head: bytes) -> list[str]:
    found = []
    for kind, offset, known in (
        ("compatible", _EXT4_COMPAT_AT, _EXT4_COMPAT),
        ("incompatible", _EXT4_INCOMPAT_AT, _EXT4_INCOMPAT),
        ("read-only compatible", _EXT4_RO_COMPAT_AT, _EXT4_RO_COMPAT),
    ):
        found += _unknown(_U32.unpack_from(head, offset)[0], known, _EXT4_NAMES[kind], f"{kind} feature")
    # The kernel would open any block device with that number.
    if _U32.unpack_from(head, _EXT4_JOURNAL_DEV_AT)[0]:
        found.append("a journal on another device")
    if head[_EXT4_MOUNT_OPTIONS_AT] != 0:
        end = _EXT4_MOUNT_OPTIONS_AT + _EXT4_MOUNT_OPTIONS_SIZE
        options = head[_EXT4_MOUNT_OPTIONS_AT:end].split(b"\0")[0]
        found.append(f"mount options {options.decode('ascii', 'backslashreplace')!r} in the superblock")
    return found


def _erofs(head: bytes) -> list[str]:
    features = _U32.unpack_from(head, _EROFS_INCOMPAT_AT)[0]
    found = _unknown(features, _EROFS_INCOMPAT, _EROFS_NAMES, "incompatible feature")
    if _U16.unpack_from(head, _EROFS_EXTRA_DEVICES_AT)[0]:
        found.append("further devices")
    return found


def _xfs(head: bytes) -> list[str]:
    found = []
    if _BE64.unpack_from(head, _XFS_LOG_START_AT)[0] == 0:
        found.append("a log on another device")
    if _BE64.unpack_from(head, _XFS_RT_BLOCKS_AT)[0]:
        found.append("a realtime device")
    if _BE16.unpack_from(head, _XFS_VERSION_AT)[0] & 0xF == 5:  # version 4 has no such fields
        for kind, offset, known in (
            ("read-only compatible", _XFS_RO_COMPAT_AT, _XFS_RO_COMPAT),
            ("incompatible", _XFS_INCOMPAT_AT, _XFS_INCOMPAT),
            ("log incompatible", _XFS_LOG_INCOMPAT_AT, _XFS_LOG_INCOMPAT),
        ):
            found += _unknown(_BE32.unpack_from(head, offset)[0], known, {}, f"{kind} feature")
    return found


def _unknown(got: int, known: int, names: Mapping[int, str], kind: str) -> list[str]:
    rest = got & ~known
    bits = [1 << number for number in range(32) if rest & 1 << number]
    return [names.get(bit) or f"{kind} {bit:#x}" for bit in bits]
