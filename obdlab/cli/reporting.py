"""How commands end: every error as one line on standard error, and an exit status."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError, caused_by, interrupt_behind
from obdlab.observe.printable import printable_lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


def reported(name: str, run: Callable[[], int], *, bounded: bool = True, failed: int = 1) -> int:
    """Run a command and return its exit status; print an error that it raises as one line, after its ``name``.

    ``failed`` is the status for an error; 130 stands for an interrupt, 141 for a reader of the output that has ended.
    ``bounded`` bounds the memory of this process (:mod:`obdlab.cli.memorybound`).
    """
    try:
        with _bounded_memory() if bounded else nullcontext():
            status = run()
        sys.stdout.flush()
    except ObdlabError as error:
        if interrupt_behind(error):  # cleaning up after Ctrl-C failed
            print(f"{name}: interrupted, and then: {printable_lines(str(error))}", file=sys.stderr)
            return 130
        print(f"{name}: {printable_lines(str(error))}{_root_hint(error)}", file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has ended
        _drop_output()
        return 141
    except OSError as error:  # such as no room for our output
        logging.getLogger(__name__).debug("%s", error, exc_info=True)
        print(f"{name}: {printable_lines(str(error))}{_root_hint(error)}", file=sys.stderr)
        _drop_output()
        return failed
    return status


def _bounded_memory() -> AbstractContextManager[None]:
    from obdlab.cli.memorybound import bounded_memory

    return bounded_memory()


# Otherwise the interpreter would flush the buffer at its end, and fail again.
def _drop_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _root_hint(error: Exception) -> str:
    refused = caused_by(error, PermissionError)
    return " (most commands need root)" if refused and os.geteuid() != 0 else ""
