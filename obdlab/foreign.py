"""Failures of other programs that give no code. This is the only module that matches texts of failures.

Each function names its program and the reason. Errors of this package have classes (``obdlab.errors``), an OSError
has an errno, a gRPC call its status, a database its SQLSTATE: nothing of these is matched here.
"""

from __future__ import annotations

import errno
import os

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE = tuple(os.strerror(number).lower() for number in NO_SPACE_ERRNOS)


def is_ref_locked(text: str) -> bool:
    """Return True if containerd says that another client writes a blob under this reference.

    It answers UNAVAILABLE, as for every other failure that may pass ("ref ... locked", core/content).
    """
    return "locked" in text


def is_proxy_unconnected(text: str) -> bool:
    """Return True if containerd says that it cannot reach a proxy plugin.

    It hands on the plugin's own UNAVAILABLE in the same way. Only gRPC's text of a connection that failed differs.
    """
    return 'desc = "transport: ' in text


def says_no_space(text: str) -> bool:
    """Return True if the output of a program (mkfs, tar, apt, a registry ...) says that a disk or a quota is full."""
    return any(words in text.lower() for words in _NO_SPACE)
