"""The audit log: one line for each noteworthy operation of the data path.

A line is a time, the word AUDIT, the name of the process, and named values:
``2026/11/24 17:30:02.120483|AUDIT|redis|[action=download][pathname=...][offset=0][size=65536][latency_us=5301]``.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from obdlab.observe.rotation import RotatingFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

#: Slow operations, which are logged: reads of the cache's disk, writes to it, and reads of local layers.
SLOW_READ_S = 1e-3
SLOW_WRITE_S = 10e-3
SLOW_LAYER_READ_S = 10e-3

_LONGEST_PATH = 2048


class _Log:
    def __init__(self, file: RotatingFile, who: str) -> None:
        self.file = file
        self.who = who
        self.failed = False


_log: _Log | None = None
#: True if operations are logged, so that callers can skip measuring them.
active = False


def configure(path: Path | None, *, size: int = 10 << 20, count: int = 3, who: str = "obdlab") -> None:
    """Log this process's operations to ``path`` from now on; None, the initial state, logs nothing.

    ``size`` and ``count`` are those of :class:`RotatingFile`; every line has the name of the process.
    """
    global _log, active
    before, _log = _log, None if path is None else _Log(RotatingFile(path, size=size, count=count), who)
    active = _log is not None
    if before is not None:
        before.file.close()


def record(action: str, path: str, offset: int, size: int, started: float) -> None:
    """Log one operation that began at ``started`` (time.monotonic) and has just ended. Never raises."""
    if _log is not None:
        latency_us = int((time.monotonic() - started) * 1e6)
        _write(
            _log, f"[action={action}][pathname={_plain(path)}][offset={offset}][size={size}][latency_us={latency_us}]"
        )


def record_slow(action: str, path: str, offset: int, size: int, started: float, slow_s: float) -> None:
    """Log as :func:`record`, if the operation took at least ``slow_s``."""
    if _log is not None and time.monotonic() - started >= slow_s:
        record(action, path, offset, size, started)


def pread_of(action: str, path: str, slow_s: float) -> Callable[[int, int, int], bytes]:
    """Return ``os.pread``, or one that logs slow calls if operations are logged: free of cost if not."""
    if _log is None:
        return os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        started = time.monotonic()
        data = os.pread(fd, length, offset)
        record_slow(action, path, offset, length, started, slow_s)
        return data

    return pread


def record_values(action: str, **values: int) -> None:
    """Log one operation that consists of numbers. Never raises."""
    if _log is not None:
        _write(_log, f"[action={action}]" + "".join(f"[{name}={value}]" for name, value in values.items()))


def without_secrets(url: str) -> str:
    """Return a URL without its credentials: user and password, query, fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "unusable URL"
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


# Removes line ends, and characters that could begin the next value.
def _plain(path: str) -> str:
    if "://" in path:
        path = without_secrets(path)
    return "".join(c if c.isprintable() and c not in "[]" else "?" for c in path[:_LONGEST_PATH])


def _write(log: _Log, values: str) -> None:
    now = time.time()
    stamp = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(now))
    line = f"{stamp}.{int(now % 1 * 1e6):06d}|AUDIT|{log.who}|{values}\n"
    try:
        log.file.write(line.encode(errors="replace"))
        log.failed = False
    except OSError as error:
        # A full disk must not stop a container. The error is logged once.
        if not log.failed:
            logger.error("%s: audit log cannot be written: %s", log.file.path, error.strerror)
        log.failed = True
