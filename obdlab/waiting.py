"""Notice to the device loop that this thread is about to wait.

A device has one thread that takes requests from the kernel (the leader). On a hit nothing else runs, so Python's
threads do not fight over the interpreter (a second reader thread costs a fifth of the IOPS). Code that may wait for
something slow, a registry above all, does so inside ``with waiting():``. The hook of the device loop then lets a
follower lead meanwhile. Outside a device loop there is no hook, and nothing happens.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_local = threading.local()


def set_waiting_hook(hook: Callable[[], None] | None) -> None:
    """Have ``hook`` called in this thread each time it is about to wait. ``None`` removes the hook."""
    _local.hook = hook


@contextmanager
def waiting() -> Iterator[None]:
    """Mark a stretch of code that may wait long (network, another thread's fetch)."""
    hook = getattr(_local, "hook", None)
    if hook is not None:
        hook()
    yield
