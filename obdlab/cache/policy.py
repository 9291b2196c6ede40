"""The decisions about what is fetched next, and how much of it. Pure: no clock, no lock, no I/O.

One table for a reader's miss, the read-ahead, the parts that a trace announces and the rest of the image. Readers
come first. The rest is fetched in the spare time of the link: from the first moment if the link is fast, after the
delay of the download if it is not.

========================================  ========================================================================
a reader waits, or did a moment ago        its miss alone is fetched: an extent (:meth:`Extent.units`)
a sequential reader comes                  :func:`window` bytes ahead of it
a trace or a hot layer is under way        its pieces, while no reader waits for other units (:func:`may_announce`)
the link is fast                           the rest, in pieces that pass in ``_PASSES_S``, as many as fill the link
the link is slow or not known yet          nothing more before the delay; then the rest, one piece after another
the day's bytes are used up, link metered  nothing more
the cache has no room for all of it        nothing more (:mod:`obdlab.cache.ahead.download` asks it)
========================================  ========================================================================
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.blob import LinkSpeed

# -- a reader's miss -------------------------------------------------------------------------------------------------

# A start needs half or less of the bytes fetched around its misses. This many times the link's bytes per wait gives
# extents of 64, 256 and 512 KiB at 100 Mbit/s and round trips of 0, 5 and 20 ms, about the best of those that were
# tried there.
_WAITS = 3.4
# With shorter waits, extents above the usual would save next to nothing, and cost the registry bytes.
_SHORT_WAIT_S = 0.005
#: The extent may be smaller than the usual by this factor.
SMALLEST = 4


class Extent:
    """Aligned runs of a power of two of units: ``usual`` many as long as the link is unknown.

    With ``most`` above 0 the link decides: up to ``most``, or down to a quarter of the usual.
    """

    def __init__(self, usual: int, most: int, unit: int) -> None:
        self._usual = usual
        self._unit = unit
        self._least = max(1, usual // SMALLEST) if most else usual
        self._most = max(usual, most)

    def units(self, link: LinkSpeed | None) -> int:
        """Return the number of units that a miss fetches now."""
        if link is None or not link.bytes_per_wait or self._least == self._most:
            return self._usual
        worthwhile = _WAITS * link.bytes_per_wait / self._unit
        most = self._usual if link.wait_s < _SHORT_WAIT_S else self._most
        units = self._least
        while 2 * units <= min(worthwhile, most):
            units *= 2
        return units

    def growth(self, units: int) -> int:
        """Return the ratio of that many units to the usual, at least 1."""
        return max(1, units // self._usual)


#: Used while an image is opened: opening reads few, known places.
SINGLE = Extent(1, 0, 1)

# -- a sequential reader ---------------------------------------------------------------------------------------------

_MIN_PIECE = 2


def window(way: int, min_way: int, most: int) -> int:
    """Return the units to have ahead of a reader that has come ``way`` units without a gap: half of its way."""
    return min(way // 2 if way >= min_way else 0, most)


def piece_of(ahead: int, most: int) -> int:
    """Return the units of one request of a window of ``ahead`` units: at least two should be in flight."""
    return min(max(_MIN_PIECE, ahead // 2), most)


# -- announced by a trace --------------------------------------------------------------------------------------------

#: Requests for announced pieces at a time.
ANNOUNCED_REQUESTS = 8
#: Most bytes of an announced piece. A reader that needs its last unit waits for all of it.
LARGEST_ANNOUNCED = 1 << 20
# Most announced bytes in flight: bounds their memory, and the wait of a reader that misses another unit.
_ANNOUNCED_UNDER_WAY = 2 << 20


def may_announce(under_way: int, *, surprised: bool) -> bool:
    """Return True if one more announced piece may be requested: no reader waits for other units."""
    return under_way < _ANNOUNCED_UNDER_WAY and not surprised


# -- the rest of the image -------------------------------------------------------------------------------------------

#: Bytes of a piece on a link of which nothing is known, and the least on any. 1 Gbit/s brings it in 2 ms.
PIECE = 256 << 10
LARGEST_PIECE = 1 << 20
# A reader waits at most this much longer because of the piece before it: about an access of a disk.
_PASSES_S = 0.01
_MOST_REQUESTS = 8
_ALIGNMENT = 64 << 10
# One piece after another leaves the link idle for a wait each: for up to an eighth of the time.
_IDLE_SHARE = 8
# A reader that has just waited for the origin is likely to do so again at once.
_QUIET_S = 0.05
_LOOK_S = 0.2
_ANNOUNCED_LOOK_S = 0.01
# The day's bytes may come back at midnight.
_BUDGET_LOOK_S = 30.0


class Why(enum.Enum):
    """The row of the table that decided."""

    DONE = "all of it is there"
    METERED = "the link is said to be metered"
    BUDGET = "the bytes of this day are used up"
    ROOM = "the cache has no room for all of it (cache_quota, cache_min_free)"
    READER = "a reader waits, or did a moment ago"
    ANNOUNCED = "the parts of a trace come first"
    DELAY = "too early for a link of this speed"
    RATE = "the rate limit"
    ENOUGH = "enough is under way"
    FETCH = "fetch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The facts at one moment. Sizes in bytes, times in seconds."""

    left: int  # missing in a row, and not under way
    under_way: int = 0  # of the rest
    wait_s: float = 0.0  # the link's; 0: not known
    rate: float = 0.0  # the link's; 0: not known
    quiet_s: float = math.inf  # since a reader waited; 0: one waits
    announced: bool = False  # pieces of a trace or a hot layer are under way
    early_s: float = 0.0  # until the end of the delay
    at_once: bool = False  # on a fast link, do not wait for the delay
    limited_s: float = 0.0  # until the rate limit lets a piece go
    allowed: float = math.inf  # left of the day's bytes
    metered: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """Request ``length`` bytes now, or (0) look again after ``pause_s``."""

    why: Why
    length: int = 0
    pause_s: float = 0.0


def speed(link: LinkSpeed | None, achieved: float = 0.0) -> tuple[float, float]:
    """Return a link's wait in seconds and rate in bytes/s, 0 if unknown, given the rate that pieces achieved."""
    if link is None or not link.bytes_per_wait or link.wait_s <= 0:
        return 0.0, achieved
    return link.wait_s, max(link.bytes_per_wait / link.wait_s, achieved)


def is_fast(rate: float) -> bool:
    """Return True if a piece passes so soon that a reader behind it hardly notices (about 200 Mbit/s)."""
    return rate * _PASSES_S >= PIECE


def pace(wait_s: float, rate: float) -> tuple[int, int]:
    """Return the bytes of a piece of the rest, and the number of pieces to have under way.

    On a fast link they are what the link carries during a wait, and one piece more: so it is never idle, and a
    reader's answer comes at most one piece later than without. On a slow one it is one piece at a time.
    """
    if not is_fast(rate):
        return PIECE, 1
    longest = PIECE
    while 2 * longest <= min(rate * _PASSES_S, LARGEST_PIECE):
        longest *= 2
    carried = rate * wait_s
    if carried * _IDLE_SHARE < longest:
        return longest, 1
    number = math.ceil(carried / longest)
    piece = int(carried / number) // _ALIGNMENT * _ALIGNMENT
    return max(_ALIGNMENT, piece), min(_MOST_REQUESTS, number + 1)


def next_step(now: Situation) -> Step:
    """Decide what the image's completion does now."""
    if now.left <= 0:
        return Step(Why.DONE)
    if now.metered:
        return Step(Why.METERED)
    if now.quiet_s < _QUIET_S:
        return Step(Why.READER, pause_s=_QUIET_S - now.quiet_s)
    if now.announced:
        return Step(Why.ANNOUNCED, pause_s=_ANNOUNCED_LOOK_S)
    if now.early_s > 0 and not (now.at_once and is_fast(now.rate)):
        return Step(Why.DELAY, pause_s=min(now.early_s, _LOOK_S if now.at_once else now.early_s))
    piece, number = pace(now.wait_s, now.rate)
    length = min(piece, now.left)
    if now.allowed < length:
        return Step(Why.BUDGET, pause_s=_BUDGET_LOOK_S)
    if now.limited_s > 0:
        return Step(Why.RATE, pause_s=now.limited_s)
    if now.under_way and now.under_way + length > number * piece:
        return Step(Why.ENOUGH, pause_s=_LOOK_S)
    return Step(Why.FETCH, length)


@dataclass(frozen=True, slots=True)
class Part:
    """A blob of an image: its bytes, and those of them that readers asked for so far."""

    size: int
    demanded: int


def most_likely(parts: Sequence[Part]) -> int:
    """Return the number of the part to complete first; ``parts`` are the layers from the bottom up, not empty.

    The one whose readers have asked for the largest share: they go on there. Among equals the topmost, which is the
    application.
    """

    def rank(number: int) -> tuple[float, int]:
        return parts[number].demanded / max(1, parts[number].size), number

    return max(range(len(parts)), key=rank)
