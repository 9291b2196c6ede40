"""Recording the reads of a start into a trace file, by the original's protocol of files beside it.

``recordTracePath`` names a file. If it exists and is empty, ``<file>.lock`` is made and reads are recorded until
that file is removed or the image is closed; then the trace is written and ``<file>.ok`` made.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.formats.trace import Trace
from obdlab.layers.recorder import Recorder, reads_of

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_LOOK_S = 1.0


class RecordingError(ObdlabError, code="recording"):
    """A trace cannot be recorded or written."""


class Recording:
    """Records the reads of one image, from now on, for the trace file ``path``. Raises RecordingError.

    The lock file exists until :meth:`finish`.
    """

    def __init__(self, path: str) -> None:
        self.recorder = Recorder()
        self._path = path
        self._lock_path, self._ok_path = Path(path + ".lock"), Path(path + ".ok")
        self._finishing = threading.Lock()
        self._finished = threading.Event()
        self._unwatch: Callable[[], None] = lambda: None
        try:
            os.close(os.open(self._lock_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise RecordingError(f"{self._lock_path}: cannot begin to record ({error.strerror})") from error

    def watch_lock(self, unwatch: Callable[[], None]) -> None:
        """Finish, in the background, when the lock file is gone; calls ``unwatch`` before the trace is written."""
        self._unwatch = unwatch
        threading.Thread(target=self._wait, name="obdlab-trace", daemon=True).start()

    def _wait(self) -> None:
        while not self._finished.wait(_LOOK_S):
            if not self._lock_path.exists():
                self.finish()

    def abandon(self) -> None:
        """Leave the trace file as it was: the image could not be opened."""
        self._finished.set()
        self._lock_path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Write the trace. On an error, logs it and leaves the file empty."""
        with self._finishing:
            if self._finished.is_set():
                return
            self._finished.set()
            self._unwatch()
            try:
                self._write()
            except (OSError, ObdlabError) as error:
                logger.error("%s: trace not written: %s", self._path, error)

    def _write(self) -> None:
        recorder = self.recorder
        if recorder.left_out:
            logger.warning("%s: the last %d reads are not in the trace", self._path, recorder.left_out)
        trace = Trace.from_reads(reads_of(recorder.to_bytes()))
        try:
            Path(self._path).write_bytes(trace.to_bytes())
        except OSError:
            os.truncate(self._path, 0)
            raise
        logger.info("%s: %d reads recorded", self._path, len(trace))
        self._lock_path.unlink(missing_ok=True)
        # An older recording's file must not stand for this one.
        self._ok_path.unlink(missing_ok=True)
        self._ok_path.touch(exist_ok=False)


def wants_recording(path: str) -> bool:
    """Return True if the trace file exists and is empty."""
    try:
        return bool(path) and os.path.getsize(path) == 0
    except OSError:
        return False
