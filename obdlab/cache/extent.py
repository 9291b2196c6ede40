"""The size of a miss's fetch: larger extents for links whose waits cost much compared to their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obdlab.blob import LinkSpeed

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
