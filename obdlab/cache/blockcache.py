"""Block cache on local disk between a blob and its origin; shared by all devices and processes.

Layout: ``<directory>/blobs/<registry>/<digest>/{data, sums}`` (:mod:`obdlab.cache.layout`). Every read from it
is checked, by a CRC over the 4 KiB pages it lies in; a unit that fails is dropped and fetched again. The limits of
the directory: :mod:`obdlab.cache.space`.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import TYPE_CHECKING

from obdlab.blob import Blob, MemoryBlob
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.eviction import EvictingSpace
from obdlab.cache.flights import Demand, Statistics, total_of
from obdlab.formats.oci import check_digest
from obdlab.settings.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.cache.units import UnitCheck

logger = logging.getLogger(__name__)

# Limits the sum of the blob sizes that an image's manifest claims: the tables of their pages take disk and memory, a
# byte for each KiB.
_LARGEST = 256 << 30

_DEFAULTS = Settings()

# One component of a path that does not begin with a dot.
_REGISTRY = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9.:+\[\]-]{0,254}", re.ASCII)


class BlockCache:
    """Cached blobs below one directory.

    ``unit`` is the smallest request to an origin, a power of two >= 4096; blobs that are in the cache already keep
    theirs. After :meth:`CachedBlob.opened` a miss fetches the missing units of the aligned ``extent`` around it; with
    ``extent_max``, of a smaller or larger one, as suits the origin's ``link`` (:mod:`obdlab.cache.policy`).
    ``registry`` names the origin that is trusted for the bytes of a digest: a part of a blob cannot be checked
    against its digest, so only users of the same name share blobs. For ``quota`` and ``min_free``, which hold for
    the whole directory, see :class:`EvictingSpace`. Up to ``readahead_max`` bytes are fetched ahead of sequential
    readers (0: none). A read ends within ``deadline_s``. The constructor does no I/O; no thread runs before the
    first read.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        registry: str = "local",
        quota: int = 0,
        min_free: int = 0,
        unit: int = _DEFAULTS.cache_unit,
        extent: int = 0,
        extent_max: int = 0,
        readahead_max: int = _DEFAULTS.readahead_max,
        deadline_s: float = _DEFAULTS.read_deadline_s,
    ) -> None:
        if unit < 4096 or unit & (unit - 1):
            raise ValueError(f"cache unit: not a power of two of at least 4096 (got {unit})")
        if _REGISTRY.fullmatch(registry) is None:
            raise ValueError(f"cache: not a registry's name (got {registry!r})")
        self.space = EvictingSpace(directory, quota=quota, min_free=min_free)
        self._blobs = self.space.blobs / registry
        self._unit = unit
        self._extent = extent
        self._extent_max = extent_max
        self._readahead_max = readahead_max
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._size = 0
        self._statistics: list[Statistics] = []
        self._demand = Demand()

    def open(self, origin: Blob, digest: str, check: UnitCheck | None = None) -> Blob:
        """Return ``origin`` read through the cache; closing the result closes the origin.

        If the cache cannot be used (disk full, no permission, locked by others), logs it, reads from the origin and
        tries the cache again later. Raises FormatError if ``digest`` is malformed.

        With ``check``, the origin has checked its bytes by that already, and so are those that are cached. Such blobs
        have a directory of their own: readers that do not check must not store in it.
        """
        check_digest(digest, origin.name)
        if origin.size == 0:
            return MemoryBlob(b"", origin.name)
        with self._lock:
            fits = self._size + origin.size <= _LARGEST
            self._size += origin.size if fits else 0
        if not fits:
            what = "%s: not cached: blob of %d bytes (at most %d of all blobs of an image are)"
            logger.warning(what, origin.name, origin.size, _LARGEST)
            return origin
        blob = CachedBlob(
            origin,
            self.space,
            (self._blobs if check is None else self.space.blobs / check.name) / digest,
            self._unit if check is None else max(self._unit, check.unit),
            self._extent,
            self._extent_max,
            self._demand,
            readahead_max=self._readahead_max,
            deadline_s=self._deadline_s,
            check=check,
        )
        with self._lock:
            self._statistics.append(blob.counters)
        return blob

    def statistics(self) -> dict[str, int]:
        """Return the sums over all blobs opened so far (fields of :class:`Statistics`), and the evicted bytes."""
        with self._lock:
            return total_of(self._statistics) | {"evicted_bytes": self.space.evicted_bytes}
