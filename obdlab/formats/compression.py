"""The compression of a layer blob, by its first bytes."""

from __future__ import annotations

#: Bytes at the start of a blob that :func:`compression_of` looks at.
MAGIC_SIZE = 6

_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
}
# Zstandard skippable frames (RFC 8878 section 3.1.2): the first byte's low four bits are free.
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"


def compression_of(head: bytes) -> str:
    """Return "gzip", "zstd", "xz" or "bzip2" for the first bytes of a file of that format; else ""."""
    if head[1:4] == _ZSTD_SKIPPABLE and head[0] & 0xF0 == 0x50:
        return "zstd"
    return next((name for magic, name in _MAGICS.items() if head.startswith(magic)), "")
