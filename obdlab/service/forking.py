"""Forking a process that has one thread, and leaving the child."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable


def fork_to(run: Callable[[], None]) -> int:
    """Fork; the child runs ``run`` and ends, the parent gets its process number. Raises OSError."""
    pid = os.fork()
    if pid == 0:
        become(run)
    return pid


def become(run: Callable[[], None]) -> NoReturn:
    """In a forked child: run, and end; with status 1 if that raised."""
    status = 1
    try:
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        leave(status)


def leave(status: int) -> NoReturn:
    """End a forked child, which must not run the exit handlers of what its parent imported."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
