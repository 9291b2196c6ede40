"""The bound on a command's own memory: no image, registry or archive makes a command exhaust the host's."""

from __future__ import annotations

import argparse
import os
import resource
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.cli.packing import size_argument
from obdlab.errors import ObdlabError
from obdlab.server.protection import bound_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Bytes beyond those of the interpreter. The most that was measured: 1 GiB, of an image with as many segments as are
#: allowed.
DEFAULT_MEMORY = 4 << 30
VARIABLE = "OBDLAB_MEMORY"


class MemoryBoundError(ObdlabError):
    """The bound is malformed, or the command reached it."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Bound this process's memory for the block. A smaller limit of the caller's (``ulimit -d``) stays.

    Raises MemoryBoundError in place of MemoryError.
    """
    text = os.environ.get(VARIABLE)
    try:
        most = DEFAULT_MEMORY if text is None else size_argument(text)
    except argparse.ArgumentTypeError as error:
        raise MemoryBoundError(f"${VARIABLE}: {error}") from error
    before, stack_size = resource.getrlimit(resource.RLIMIT_DATA), threading.stack_size()
    if most and before[0] == before[1]:
        bound_memory(most)
    try:
        yield
    except MemoryError as error:
        limit = f"{most >> 20} MiB; ${VARIABLE} changes it" if most else "the system's limit"
        raise MemoryBoundError(f"needs more memory than it may take ({limit})") from error
    finally:
        # For callers inside a process that goes on.
        resource.setrlimit(resource.RLIMIT_DATA, before)
        threading.stack_size(stack_size)
