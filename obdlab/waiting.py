"""Notice to the device loop that this thread is about to wait.

A device has one thread that takes requests from the kernel (the leader). On a hit nothing else runs, so Python's
threads do not fight over the interpreter (a second reader thread costs a fifth of the IOPS). Code that may wait for
something slow, a registry above all, first calls :func:`about_to_wait`. The hook of the device loop then lets a
follower lead meanwhile. Outside a device loop there is no hook, and nothing happens.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class _OfThread(threading.local):
    hook: Callable[[], None] | None = None


_local = _OfThread()


def set_waiting_hook(hook: Callable[[], None] | None) -> None:
    """Have ``hook`` called in this thread each time it is about to wait. ``None`` removes the hook."""
    _local.hook = hook


def about_to_wait() -> None:
    """Give notice that the thread may wait long now (network, another thread's fetch)."""
    hook = _local.hook
    if hook is not None:
        hook()
