"""What is known of the way to a registry: how long a request waits for its answer, and how fast that comes then."""

from __future__ import annotations

import statistics
import threading
from collections import deque

# The last answers speak for the link: it may change, and one that comes at once or late says little.
_SAMPLES = 8
# Of a shorter answer most has come with its first bytes: how long the rest took is no rate.
_LEAST_FOR_RATE = 64 << 10
# More than any link brings; a body that lay in the socket's buffer took no time at all.
_FASTEST = 10 << 30


class Link:
    """One registry's, from the answers to requests for ranges, which any thread may note."""

    def __init__(self) -> None:
        #: How long requests wait for their answer at least (a busy processor adds to it: many open an image at once),
        #: and bytes per second then, as a median; 0: not known yet.
        self.wait_s = self.rate = 0.0
        self._lock = threading.Lock()
        self._waits_s: deque[float] = deque(maxlen=_SAMPLES)
        self._rates: deque[float] = deque(maxlen=_SAMPLES)

    def note(self, wait_s: float, length: int, body_s: float) -> None:
        """An answer of ``length`` bytes began ``wait_s`` after its request, and ended ``body_s`` later."""
        with self._lock:
            self._waits_s.append(wait_s)
            self.wait_s = min(self._waits_s)
            if length >= _LEAST_FOR_RATE:
                self._rates.append(length / max(body_s, length / _FASTEST))
                self.rate = statistics.median(self._rates)
