"""Process-wide counters and histograms of the rare events: registry requests, misses, retries, failures.

They cost about a microsecond each under a lock, so events of every hit are counted elsewhere, by plain integers of
one thread. A process forked from this one begins at zero.

Every value is a number under two names, ``{family: {label: number}}``. Such tables add up and travel as JSON; the
exporter gives the families their descriptions. A histogram is a family too: its labels are the powers of two of
nanoseconds (``"20"``: less than 2^20 ns, and at least half of that) and ``"sum"``, in seconds.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: ``{family: {label: number}}``.
Table = dict[str, dict[str, float]]

#: Length of a list of counts by the bit length of nanoseconds.
TIME_SLOTS = 65
_SUM = "sum"

_lock = threading.Lock()
_counted: Table = {}
_moments: dict[str, float] = {}


class Counter:
    """A number that only grows, or one for each label."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def add(self, amount: float = 1, label: str = "") -> None:
        """Add to the number."""
        with _lock:
            labels = _counted.setdefault(self.name, {})
            labels[label] = labels.get(label, 0) + amount


class Histogram:
    """Counts of durations, by powers of two."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def observe(self, duration_s: float) -> None:
        """Count one duration."""
        bucket = str(int(duration_s * 1e9).bit_length())
        with _lock:
            labels = _counted.setdefault(self.name, {})
            labels[bucket] = labels.get(bucket, 0) + 1
            labels[_SUM] = labels.get(_SUM, 0.0) + duration_s


class Moment:
    """Time of the last occurrence of an event."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def now(self) -> None:
        """Record that the event occurs now."""
        _moments[self.name] = time.monotonic()


#: HTTP exchanges with registries and their token servers, by status, or "failed" without an answer.
REGISTRY_REQUESTS = Counter("registry_requests")
#: Tries after the first one.
REGISTRY_RETRIES = Counter("registry_retries")
#: Reads of a blob at its origin, retries included: durations of the successful ones, and their bytes.
DOWNLOAD_TIMES = Histogram("download_seconds")
DOWNLOAD_BYTES = Counter("download_bytes")
#: Time that readers waited for data missing from the block cache.
MISS_TIMES = Histogram("miss_seconds")
#: Failed stores into the block cache.
STORE_FAILURES = Counter("cache_store_failures")
#: By the place of detection: "cache" (a unit on disk), "zfile" (a block or index), "tree" (a unit or the hash tree),
#: "target" (a piece of a turboOCI layer's target), "digest" (a whole blob).
CHECKSUM_FAILURES = Counter("checksum_failures")
DECOMPRESSION_FAILURES = Counter("decompression_failures")
#: Damage that was replaced by sound bytes, by the place of detection.
CORRUPTIONS_HEALED = Counter("corruptions_healed")

#: Layers opened to be read from a registry: "checked" by a hash tree or sums, or "unchecked".
LAZY_LAYERS = Counter("lazy_layers")

REGISTRY_ANSWERED = Moment("registry_answered")
REGISTRY_FAILED = Moment("registry_failed")


def counted() -> Table:
    """Return the counts of this process so far."""
    with _lock:
        return {name: dict(labels) for name, labels in _counted.items()}


def ages_s() -> dict[str, float]:
    """Return the seconds since each moment; moments that never came are left out."""
    now = time.monotonic()
    return {name: now - moment for name, moment in dict(_moments).items()}


def add_to(total: Table, table: Table) -> None:
    """Add ``table`` to ``total``, number by number."""
    for name, labels in table.items():
        sums = total.setdefault(name, {})
        for label, number in labels.items():
            sums[label] = sums.get(label, 0) + number


def times_table(counts: Sequence[int], sum_ns: int) -> dict[str, float]:
    """Return a histogram's labels, given the counts of durations by the bit length of their nanoseconds."""
    labels: dict[str, float] = {str(bits): count for bits, count in enumerate(counts) if count}
    return labels | {_SUM: sum_ns / 1e9} if labels else {}


def cumulated(labels: dict[str, float], bounds: Iterable[int]) -> tuple[list[float], float, float]:
    """Return the numbers of durations below ``2**bits`` ns for each of ``bounds``, their total number and their sum.

    The sum is in seconds.
    """
    counts = sorted((int(label), count) for label, count in labels.items() if label != _SUM)
    below = [sum(count for bits, count in counts if bits <= bound) for bound in bounds]
    return below, sum(count for _, count in counts), labels.get(_SUM, 0.0)


def _begin_anew() -> None:
    global _lock
    _lock = threading.Lock()
    _counted.clear()
    _moments.clear()


os.register_at_fork(after_in_child=_begin_anew)
