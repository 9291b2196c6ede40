"""What is known of the way to a registry: how long a request waits, and how much would come meanwhile."""

from __future__ import annotations

import statistics
import threading
from collections import deque

# The last answers speak for the link: it may change, and one that comes at once or late says little.
_SAMPLES = 8
# The first come while a container is being made as well, which keeps the processor busy.
_LEAST_SAMPLES = 3
# Of a shorter answer most has come with its first bytes, and many of them are asked for at once, on a busy processor,
# while an image is opened.
_LEAST = 64 << 10
# More than any link brings; a body that lay in the socket's buffer took no time at all.
_FASTEST = 10 << 30


class Link:
    """One registry's, from the answers to requests for ranges, which any thread may note.

    Mirrors and proxies may answer too, each in its own time: of each answer its own wait and rate belong together.
    """

    def __init__(self) -> None:
        #: How long requests wait for their answer, and what would come in that time, as medians; 0: not known yet.
        self.wait_s = 0.0
        self.bytes_per_wait = 0.0
        self._lock = threading.Lock()
        self._answers: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)

    def note(self, wait_s: float, length: int, body_s: float) -> None:
        """An answer of ``length`` bytes began ``wait_s`` after its request, and ended ``body_s`` later."""
        if length < _LEAST:
            return
        rate = length / max(body_s, length / _FASTEST)
        with self._lock:
            self._answers.append((wait_s, wait_s * rate))
            if len(self._answers) < _LEAST_SAMPLES:
                return
            waits_s, products = zip(*self._answers, strict=True)
            self.wait_s, self.bytes_per_wait = statistics.median(waits_s), statistics.median(products)
