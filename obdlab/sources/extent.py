"""How much a miss fetches at once: the more, the more a request's wait costs beside its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obdlab.registry.link import Link

# A start needs half or less of what is fetched around its misses. So many times what the link brings during a wait
# makes extents of 64, 256 and 512 KiB at 100 Mbit/s and round trips of 0, 5 and 20 ms, about the best of those that
# were tried there (docs/performance.md).
_WAITS = 3.4
# Where waits are shorter, more than the usual would save next to nothing, and cost the registry bytes.
_SHORT_WAIT_S = 0.005
#: The usual extent may become smaller by this factor.
SMALLEST = 4


class Extent:
    """Aligned stretches of units, a power of two of them: ``usual`` many as long as nothing is known of the link.

    With ``most`` above 0 it is up to so many, or down to a quarter of the usual, as the link makes it worthwhile.
    """

    def __init__(self, usual: int, most: int, unit: int) -> None:
        self._usual = usual
        self._unit = unit
        self._least = max(1, usual // SMALLEST) if most else usual
        self._most = max(usual, most)

    def units(self, link: Link | None) -> int:
        """Return how many units a miss fetches now."""
        if link is None or not link.bytes_per_wait or self._least == self._most:
            return self._usual
        worthwhile = _WAITS * link.bytes_per_wait / self._unit
        most = self._usual if link.wait_s < _SHORT_WAIT_S else self._most
        units = self._least
        while 2 * units <= min(worthwhile, most):
            units *= 2
        return units

    def growth(self, units: int) -> int:
        """Return how many times the usual that is, at least 1."""
        return max(1, units // self._usual)


#: While an image is opened: those who do that read little, and know where.
SINGLE = Extent(1, 0, 1)
