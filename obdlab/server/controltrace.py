"""Control socket actions for recording: ``trace-start`` and ``trace-stop``, at any time, in all servers.

A mark in the device's directory has the server's helpers, including later ones, record their reads.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.blob import find
from obdlab.command import command
from obdlab.errors import DeviceError
from obdlab.formats.trace import Trace
from obdlab.layers.recorder import Recorder, reads_of
from obdlab.layers.stack import Stack, WritableStack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.blob import Blob

    Answer = dict[str, Any]
    Tell = Callable[[dict[str, Any]], None]
    Ask = Callable[[str, Callable[[int], dict[str, Any]]], list[Answer]]

log = logging.getLogger(__name__)

_MARK = "recording"


class Tracing:
    """Records one device's reads of its layers.

    ``ask_helpers(op, arguments of each)`` asks all its helpers, and returns the answers of those that do not fail.
    """

    def __init__(self, blob: Blob, directory: Path, ask_helpers: Ask, *, helper: bool) -> None:
        self._blob = blob
        self._directory = directory
        self._mark = directory / _MARK
        self._ask_helpers = ask_helpers
        self._helper = helper
        self._changing = threading.Lock()
        self._watched: tuple[Stack, Recorder] | None = None
        #: By the name of the request. An action gets the request, and a function that reports progress.
        self.actions: dict[str, Callable[[dict[str, Any], Tell], Answer]] = {
            "trace-start": self._start,
            "trace-stop": self._stop,
        }
        if helper and self._mark.exists():
            self._watch()

    @property
    def active(self) -> bool:
        """Whether reads are recorded now."""
        return self._watched is not None

    def _start(self, _: dict[str, Any], __: Tell) -> Answer:
        with self._changing:
            if self._watched is not None:
                raise DeviceError(f"is being recorded already ({command('trace', 'stop')} ends that)")
            self._watch()
            if not self._helper:
                with self._or_unwatch():
                    self._mark.touch()
                    self._ask_helpers("trace-start", lambda _: {})
        return {}

    def _stop(self, request: dict[str, Any], _: Tell) -> Answer:
        path = Path(str(request.get("path", "")))
        with self._changing:
            if self._watched is None:
                raise DeviceError("is not being recorded")
            stack, recorder = self._watched
            stack.watch(None)
            self._watched = None
        if self._helper:
            _write(path, recorder.to_bytes())
            return {"left_out": recorder.left_out}
        self._mark.unlink(missing_ok=True)
        noted, left_out = self._noted_by_helpers()
        trace = Trace.from_reads(reads_of(recorder.to_bytes(), *noted))
        _write(path, trace.to_bytes())
        return {"reads": len(trace), "size": trace.size, "left_out": recorder.left_out + left_out}

    def _watch(self) -> None:
        writable = find(self._blob, WritableStack)
        stack = find(self._blob, Stack) if writable is None else writable.lowers
        if stack is None:
            raise DeviceError("has no read-only layers to record the reads of")
        recorder = Recorder()
        stack.watch(recorder.around)
        self._watched = (stack, recorder)

    @contextmanager
    def _or_unwatch(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self._watched is not None:
                self._watched[0].watch(None)
                self._watched = None
            self._mark.unlink(missing_ok=True)
            raise

    def _noted_by_helpers(self) -> tuple[list[bytes], int]:
        # Through files: too much for a message.
        answers = self._ask_helpers("trace-stop", lambda number: {"path": str(self._directory / f"noted-{number}")})
        noted = []
        for path in self._directory.glob("noted-*"):
            with suppress(OSError):
                noted.append(path.read_bytes())
                path.unlink()
        return noted, sum(int(answer.get("left_out", 0)) for answer in answers)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DeviceError(f"{path}: cannot write ({error.strerror})") from error
