"""Control socket actions for recording: ``trace-start`` and ``trace-stop``, at any time, in all servers.

A mark in the device's directory has the server's helpers, including later ones, record their reads.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from obdlab.blob import find
from obdlab.command import command
from obdlab.errors import DeviceError
from obdlab.formats.trace import Trace
from obdlab.layers.recorder import Recorder, reads_of
from obdlab.layers.stack import Stack, WritableStack
from obdlab.server.messages import Done, Recorded, TraceStart, TraceStop
from obdlab.system.newfile import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.blob import Blob
    from obdlab.server.messages import ControlRequest, Step

    Tell = Callable[[Step], None]

    class Ask(Protocol):
        """Asks all helpers."""

        def __call__(self, request: Callable[[int], ControlRequest], kind: type[T], silence_s: float, /) -> list[T]:
            """Return the answers, of that kind, of those that are not silent for ``silence_s``."""


T = TypeVar("T")

log = logging.getLogger(__name__)

_MARK = "recording"
#: A trace without a helper's reads is incomplete, so a busy helper is waited for.
_HELPER_SILENCE_S = 30.0


class Tracing:
    """Records one device's reads of its layers.

    ``ask_helpers(request of each, kind, silence_s)`` asks all its helpers, and returns the answers of those that do
    not fail.
    """

    def __init__(self, blob: Blob, directory: Path, ask_helpers: Ask, *, helper: bool) -> None:
        self._blob = blob
        self._directory = directory
        self._mark = directory / _MARK
        self._ask_helpers = ask_helpers
        self._helper = helper
        self._changing = threading.Lock()
        self._watched: tuple[Stack, Recorder] | None = None
        #: By the request's class. An action gets the request, and a function that reports progress.
        self.actions: dict[type[ControlRequest], Callable[[Any, Tell], object]] = {
            TraceStart: self._start,
            TraceStop: self._stop,
        }
        if helper and self._mark.exists():
            self._watch()

    @property
    def active(self) -> bool:
        """Whether reads are recorded now."""
        return self._watched is not None

    def _start(self, _: TraceStart, __: Tell) -> Done:
        with self._changing:
            if self._watched is not None:
                raise DeviceError(f"is being recorded already ({command('trace', 'stop')} ends that)")
            self._watch()
            if not self._helper:
                with self._or_unwatch():
                    for path in self._directory.glob("noted-*"):  # a helper's answer that came too late
                        path.unlink(missing_ok=True)
                    self._mark.touch()
                    self._ask_helpers(lambda _: TraceStart(), Done, _HELPER_SILENCE_S)
        return Done()

    def _stop(self, request: TraceStop, _: Tell) -> Recorded:
        path = Path(request.path)
        with self._changing:
            if self._watched is None:
                raise DeviceError("is not being recorded")
            stack, recorder = self._watched
            stack.watch(None)
            self._watched = None
        if self._helper:
            _write(path, recorder.to_bytes())
            return Recorded(left_out=recorder.left_out)
        self._mark.unlink(missing_ok=True)
        noted, left_out = self._noted_by_helpers()
        trace = Trace.from_reads(reads_of(recorder.to_bytes(), *noted))
        _write(path, trace.to_bytes())
        return Recorded(len(trace), trace.size, recorder.left_out + left_out)

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
        answers = self._ask_helpers(
            lambda number: TraceStop(str(self._directory / f"noted-{number}")), Recorded, _HELPER_SILENCE_S
        )
        noted = []
        for path in self._directory.glob("noted-*"):
            with suppress(OSError):
                noted.append(path.read_bytes())
                path.unlink()
        return noted, sum(answer.left_out for answer in answers)


def _write(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data, private=False)
    except OSError as error:
        raise DeviceError(f"{path}: cannot write ({error.strerror})") from error
