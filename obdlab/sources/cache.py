"""Block cache on local disk between a blob and where it comes from; shared by all devices and processes.

Layout: ``<directory>/blobs/<registry>/<digest>/{data, sums}`` (:mod:`obdlab.sources.cachelayout`). Every read from it
is checked, by a CRC over the 4 KiB pages it lies in; what fails is dropped and fetched again. How the directory is
kept within its limits: :mod:`obdlab.sources.cachespace`.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import TYPE_CHECKING

from obdlab.blob import Blob, MemoryBlob
from obdlab.formats.oci import check_digest
from obdlab.sources.cachedblob import CachedBlob
from obdlab.sources.cachespace import CacheSpace
from obdlab.sources.flights import Demand, Statistics, total_of

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

# What manifests say of the sizes of an image's blobs is believed only so far: the tables of their pages take disk and
# memory, a byte for each KiB.
_LARGEST = 256 << 30

# One component of a path, and none that begins with a dot.
_REGISTRY = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9.:+\[\]-]{0,254}", re.ASCII)


class BlockCache:
    """Cached blobs below one directory.

    ``unit`` is the least that is asked of an origin, a power of two >= 4096; blobs that are in the cache already keep
    the one they were begun with. After :meth:`CachedBlob.opened` a miss fetches what is missing of the aligned
    ``extent`` around it; with ``extent_max`` of a smaller or larger one, as origins that know their ``link`` make it
    worthwhile (:mod:`obdlab.sources.extent`). ``registry`` names whose word is taken for what belongs to a digest:
    a part of a blob cannot be checked against it, so blobs are shared only between those who name the same. For
    ``quota`` and ``min_free``, which hold for the whole directory, see :class:`CacheSpace`.
    Sequential readers have up to ``readahead_max`` bytes fetched ahead of them (0: none). A read ends within
    ``deadline_s``. Making one touches nothing; no thread runs before the first read.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        registry: str = "local",
        quota: int = 0,
        min_free: int = 0,
        unit: int = 64 << 10,
        extent: int = 0,
        extent_max: int = 0,
        readahead_max: int = 4 << 20,
        deadline_s: float = 120.0,
    ) -> None:
        if unit < 4096 or unit & (unit - 1):
            raise ValueError(f"cache unit: not a power of two of at least 4096 (got {unit})")
        if _REGISTRY.fullmatch(registry) is None:
            raise ValueError(f"cache: not a registry's name (got {registry!r})")
        self.space = CacheSpace(directory, quota=quota, min_free=min_free)
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

    def open(self, origin: Blob, digest: str) -> Blob:
        """Return ``origin`` seen through the cache; closing that closes the origin.

        A cache that cannot be used (disk full, no permission, locked by others) is said in the log, reads go to the
        origin, and it is tried again later. Raises FormatError if ``digest`` is none.
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
            self._blobs / digest,
            self._unit,
            self._extent,
            self._extent_max,
            self._demand,
            readahead_max=self._readahead_max,
            deadline_s=self._deadline_s,
        )
        with self._lock:
            self._statistics.append(blob.counters)
        return blob

    def statistics(self) -> dict[str, int]:
        """Return the sums over all blobs opened so far (fields of :class:`Statistics`), and the bytes given back."""
        with self._lock:
            return total_of(self._statistics) | {"evicted_bytes": self.space.evicted_bytes}
