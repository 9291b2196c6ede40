"""The space of a file system that obdlab leaves to others."""

from __future__ import annotations

#: A limit in bytes would be more than all of a small disk.
_SHARE = 16


def kept_free(size: int, wanted: int) -> int:
    """Return the bytes to leave free of a file system of ``size`` bytes: ``wanted``, at most a sixteenth of it."""
    return min(wanted, size // _SHARE)
