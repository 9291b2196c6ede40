"""The health of a helper in front of a registry (a mirror, a proxy): in use, or passed over for a while."""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 120.0
_ABSENT_S = 60.0
_MOST_ABSENT = 4096


class Standing:
    """Passes over a failed helper: for 5 s at first, then twice as long each time, up to 2 minutes. Thread-safe."""

    def __init__(self, name: str, *, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        self._name = name
        self._first_pause_s = first_pause_s
        self._lock = threading.Lock()
        self._pause_s = first_pause_s
        self._until = 0.0
        self._failing = False

    def usable(self) -> bool:
        """Return True if the helper may be asked."""
        return time.monotonic() >= self._until

    def failed(self, cause: object) -> None:
        """Pass the helper over for a while. Logs once for all requests that fail at the same time."""
        with self._lock:
            if not self.usable():
                return
            pause = self._pause_s
            self._until = time.monotonic() + pause
            self._pause_s = min(2 * pause, _LONGEST_PAUSE_S)
            self._failing = True
        logger.warning("%s: passed over for %.3g s: %s", self._name, pause, cause)

    def worked(self) -> None:
        """Forget earlier failures."""
        if not self._failing:
            return
        with self._lock:
            was_failing, self._failing = self._failing, False
            self._pause_s = self._first_pause_s
            self._until = 0.0
        if was_failing:
            logger.info("%s: works again", self._name)


class Absences:
    """Blobs that a helper lacks or has wrong: it is not asked for them for a minute. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def add(self, url: str) -> None:
        """Add the URL of a blob."""
        now = time.monotonic()
        with self._lock:
            if len(self._until) >= _MOST_ABSENT:
                self._until = {key: end for key, end in self._until.items() if end > now}
            if len(self._until) < _MOST_ABSENT:
                self._until[url] = now + _ABSENT_S

    def __contains__(self, url: str) -> bool:
        return time.monotonic() < self._until.get(url, 0.0)
