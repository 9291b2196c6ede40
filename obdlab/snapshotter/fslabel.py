"""The file system that a label asks for, limited to harmless ones.

``ext4;;-d /etc`` would copy the host's files into a container; ``erofs;device=/dev/sda`` would show it the host's
disk. So only the types, mount options and mkfs options listed here pass. The snapshotter's own configuration
(``defaultFsType``) is trusted and may contain anything.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from obdlab.formats.oci import BLOB_FS_TYPE
from obdlab.snapshotter.errors import InvalidArgumentError
from obdlab.snapshotter.writable import FsSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MAX_LABEL = 1024
_TYPES = ("ext4", "erofs", "xfs", "f2fs", "ntfs")
# No option here names anything outside of the file system or gives the kernel extra work.
_MOUNT_OPTIONS = re.compile(
    r"ro|rw|nosuid|nodev|noexec|sync|dirsync|noatime|nodiratime|relatime|strictatime|lazytime"
    r"|(no)?(discard|acl|user_xattr|barrier|delalloc|grpid|block_validity|largeio)"
    r"|noload|norecovery|nouuid|inode32|inode64|dioread_lock|dioread_nolock|errors=remount-ro"
    r"|data=(ordered|writeback|journal)|commit=[0-9]{1,4}|cache_strategy=(disabled|readahead|readaround)",
    re.ASCII,
)
_NUMBER = r"[0-9]{1,10}[kKmMgG]?"
_WORD = r"[A-Za-z0-9_.-]{1,64}"
# Options of mkfs by type: each with the pattern of its value, None for an option without a value.
_MKFS_OPTIONS: Mapping[str, Mapping[str, re.Pattern[str] | None]] = {
    "ext4": {
        "-F": None,
        "-q": None,
        **dict.fromkeys(("-b", "-C", "-G", "-g", "-i", "-I", "-m", "-N"), re.compile(_NUMBER, re.ASCII)),
        **dict.fromkeys(("-L", "-U"), re.compile(_WORD, re.ASCII)),
        "-O": re.compile(r"\^?[a-z0-9_]{1,32}(,\^?[a-z0-9_]{1,32}){0,31}", re.ASCII),
        "-J": re.compile(rf"size={_NUMBER}", re.ASCII),
        "-E": re.compile(
            r"(?:(?:nodiscard|discard|lazy_itable_init=[01]|lazy_journal_init=[01]|packed_meta_blocks=[01])(?:,|$))+",
            re.ASCII,
        ),
    },
    "xfs": {
        "-f": None,
        "-K": None,
        "-q": None,
        "-L": re.compile(_WORD, re.ASCII),
        **dict.fromkeys(
            ("-b", "-d", "-i", "-l", "-m", "-n", "-s"),
            re.compile(
                rf"(?:size|crc|finobt|reflink|rmapbt|bigtime|inobtcount|sparse|ftype|agcount|maxpct)={_NUMBER}"
                rf"(?:,(?:crc|finobt|reflink|rmapbt|bigtime|inobtcount|sparse|ftype|agcount|maxpct)={_NUMBER}){{0,7}}",
                re.ASCII,
            ),
        ),
    },
}


def spec_of_label(text: str, default: str) -> FsSpec:
    """Return the file system that a label asks for. ``default`` comes from the configuration and is always allowed.

    Raises InvalidArgumentError for anything that is not listed here.
    """
    if text == default:
        return FsSpec.parse(text)
    if len(text) > _MAX_LABEL:
        raise InvalidArgumentError(f"label {BLOB_FS_TYPE}: too long (got {len(text)} characters)")
    spec = FsSpec.parse(text)
    if spec.fs_type not in _TYPES:
        raise _refused("file system", spec.fs_type, f"one of {', '.join(_TYPES)}")
    for option in filter(None, (spec.mount_options or "").split(",")):
        if _MOUNT_OPTIONS.fullmatch(option) is None:
            raise _refused("mount option", option, "one that can do the host no harm")
    _check_mkfs(spec.fs_type, spec.mkfs_options or ())
    return spec


def _check_mkfs(fs_type: str, words: Sequence[str]) -> None:
    known = _MKFS_OPTIONS.get(fs_type, {})
    rest = iter(words)
    for word in rest:
        if word not in known:
            raise _refused("mkfs option", word, f"one of {' '.join(known) or 'none'}")
        pattern = known[word]
        if pattern is not None:
            value = next(rest, "")
            if pattern.fullmatch(value) is None:
                raise _refused(f"value of mkfs option {word}", value, "a plain number or word")


def _refused(what: str, got: str, wanted: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"label {BLOB_FS_TYPE}: {what} not allowed there (got {got[:100]!r}, wanted {wanted}; the snapshotter's "
        "configuration, defaultFsType, may say anything)"
    )
