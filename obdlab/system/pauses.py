"""Waiting for another process or the kernel without an event: looks at a condition, and pauses between tries."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout_s: float, *, look_s: float) -> bool:
    """Return True as soon as ``condition()`` is true. Look every ``look_s``; return False after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(look_s)
    return True


def backoff_s(failures: int, first_s: float, longest_s: float) -> float:
    """Return the pause after that many failures beyond the first: ``first_s``, doubled with each of them."""
    return min(longest_s, first_s * 2.0 ** min(failures, 32))
