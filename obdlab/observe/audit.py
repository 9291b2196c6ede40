"""The audit log: one line for each operation of the data path that is worth one.

A line is a time, the word AUDIT, who wrote it, and named values:
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

#: Reads of the cache's disk that take this long are written down, and writes to it, and reads of local layers.
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


def configure(path: Path | None, *, size: int = 10 << 20, count: int = 3, who: str = "obdlab") -> None:
    """Write this process's operations to ``path`` from now on, or nowhere (None, as it is at first).

    ``size`` and ``count`` are those of :class:`RotatingFile`; ``who`` stands in every line.
    """
    global _log
    before, _log = _log, None if path is None else _Log(RotatingFile(path, size=size, count=count), who)
    if before is not None:
        before.file.close()


def enabled() -> bool:
    """Whether operations are written down; for those who would have to measure something first."""
    return _log is not None


def record(action: str, path: str, offset: int, size: int, started: float) -> None:
    """Write one operation that began at ``started`` (time.monotonic) and is over now. Never raises."""
    if _log is not None:
        latency_us = int((time.monotonic() - started) * 1e6)
        _write(
            _log, f"[action={action}][pathname={_plain(path)}][offset={offset}][size={size}][latency_us={latency_us}]"
        )


def record_slow(action: str, path: str, offset: int, size: int, started: float, slow_s: float) -> None:
    """As :func:`record`, if the operation took ``slow_s`` at least."""
    if _log is not None and time.monotonic() - started >= slow_s:
        record(action, path, offset, size, started)


def pread_of(action: str, path: str, slow_s: float) -> Callable[[int, int, int], bytes]:
    """Return ``os.pread``, or one that records slow calls if operations are written down: free of cost if not."""
    if _log is None:
        return os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        started = time.monotonic()
        data = os.pread(fd, length, offset)
        record_slow(action, path, offset, length, started, slow_s)
        return data

    return pread


def record_values(action: str, **values: int) -> None:
    """Write one operation that is told by numbers. Never raises."""
    if _log is not None:
        _write(_log, f"[action={action}]" + "".join(f"[{name}={value}]" for name, value in values.items()))


def without_secrets(url: str) -> str:
    """Return a URL without what may let its reader in: user and password, query, fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "unusable URL"
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


# No line end, and nothing that looks like the next value.
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
        # A disk that is full must not stop a container; once is said enough.
        if not log.failed:
            logger.error("%s: audit log cannot be written: %s", log.file.path, error.strerror)
        log.failed = True
