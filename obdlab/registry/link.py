"""Measurements of the link to a registry: the wait for an answer, and the bytes that arrive in that time."""

from __future__ import annotations

import threading
from collections import deque

# The median of the last answers counts: the link may change, and a single early or late answer says little.
_SAMPLES = 8
# The first answers come while a container is being made, which keeps the processor busy.
_LEAST_SAMPLES = 3
#: Most of a shorter answer arrives with its first bytes. Also, many of them are requested at once, on a busy
#: processor, while an image is opened.
LEAST_NOTED = 64 << 10
# Faster than any link: a body that lay in the socket's buffer took no time.
_FASTEST = 10 << 30


class Link:
    """The link to one registry, measured by the answers to range requests. Any thread may note one.

    Mirrors and proxies may answer too, at different speeds: so wait and rate of the same answer are kept together.
    """

    def __init__(self) -> None:
        #: Medians of the wait for an answer and of the bytes that would arrive in that time; 0: not known yet.
        self.wait_s = 0.0
        self.bytes_per_wait = 0.0
        self._lock = threading.Lock()
        self._answers: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)
        self._bodies = 0

    def begin_body(self) -> int:
        """Note that an answer begins to arrive; return the number of those that arrive now."""
        with self._lock:
            self._bodies += 1
            return self._bodies

    def end_body(self) -> int:
        """Note that an answer has arrived, or broke off; return the number of those that arrived till now."""
        with self._lock:
            self._bodies -= 1
            return self._bodies + 1

    def note(self, wait_s: float, length: int, body_s: float, sharers: float = 1.0) -> None:
        """Add an answer of ``length`` bytes that began ``wait_s`` after its request and ended ``body_s`` later.

        It shared the link with others: so many answers arrived at a time on average, itself included.
        """
        if length < LEAST_NOTED:
            return
        from statistics import median  # decimals and fractions with it: not for a client that only asks for manifests

        rate = min(_FASTEST, sharers * length / max(body_s, length / _FASTEST))
        with self._lock:
            self._answers.append((wait_s, wait_s * rate))
            if len(self._answers) < _LEAST_SAMPLES:
                return
            waits_s, products = zip(*self._answers, strict=True)
            self.wait_s, self.bytes_per_wait = median(waits_s), median(products)
