"""A blob in a registry, read by HTTP range requests.

The kernel repeats a failed read, piece by piece, before it reports the error: a page that cannot be fetched would
take several deadlines. So a read that has just failed for want of time fails again at once.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.call import UNBOUND, Call
from obdlab.formats.oci import check_digest
from obdlab.observe import audit
from obdlab.observe.counters import DOWNLOAD_BYTES, DOWNLOAD_TIMES
from obdlab.registry.errors import RegistryError
from obdlab.registry.p2p import NO_HEADERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obdlab.registry.client import RegistryClient
    from obdlab.registry.link import Link
    from obdlab.registry.rangestream import RangeStream
    from obdlab.registry.reference import Repository

# The kernel repeats within milliseconds. With a longer time, a registry that is back would be missed.
_REMEMBERED_S = 2.0
_MOST_REMEMBERED = 64
log = logging.getLogger(__name__)

# A failed read with less than this share of the deadline (one ahead of its reader) does not count for full ones.
_FULL_SHARE = 0.5


class RemoteBlob(Blob):
    """A registry's blob of a size known beforehand (from its descriptor). Nothing is requested before a read.

    ``deadline_s`` bounds each read with all its retries; without it the client's own deadline does. A P2P proxy gets
    the headers ``aside`` with each request.
    """

    def __init__(
        self,
        client: RegistryClient,
        repository: Repository,
        digest: str,
        size: int,
        *,
        deadline_s: float | None = None,
        aside: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        self.name = f"{repository}@{check_digest(digest, str(repository))}"
        self._client = client
        self._repository = repository
        self._digest = digest
        self._url = f"{repository.blobs_url}/{digest}"
        self._size = size
        self._link = client.link(repository)
        self._aside = aside
        #: The time that a read may take.
        self.deadline_s = client.deadline_s if deadline_s is None else deadline_s
        #: The terms of reads without a call.
        self.terms = UNBOUND
        # Ranges that could not be read in time: (end of validity, offset, stop, error).
        self._failed: tuple[tuple[float, int, int, RegistryError], ...] = ()

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Send one range request. Raises RegistryError naming the blob and the offset."""
        if offset < 0 or length <= 0 or offset + length > self._size:
            check_range(self, offset, length)
            return b""
        started = time.monotonic()
        if self._failed:
            self._check_failed(offset, offset + length, started)
        try:
            terms = call or self.terms
            if terms.deadline is None or started + self.deadline_s < terms.deadline:
                terms = Call(started + self.deadline_s, terms.on_wait)
            if terms.on_wait is not None:
                terms.on_wait()
            data = self._client.read_range(
                self._repository,
                self._digest,
                offset,
                length,
                terms,
                size=self._size,
                name=self.name,
                aside=self._aside,
            )
        except RegistryError as error:
            now = time.monotonic()
            audit.record("download_failed", self._url, offset, length, started)
            if error.temporary and now - started >= self.deadline_s * _FULL_SHARE:
                known = self._failed[1 - _MOST_REMEMBERED :]
                self._failed = (*known, (now + _REMEMBERED_S, offset, offset + length, error))
            raise
        DOWNLOAD_TIMES.observe(time.monotonic() - started)
        DOWNLOAD_BYTES.add(length)
        if audit.active:
            audit.record("download", self._url, offset, length, started)
        self._failed = ()  # the registry is back
        return data

    @property
    def link(self) -> Link:
        """Measurements of the link to the registry."""
        return self._link

    def stream(self, offset: int, length: int, call: Call | None = None) -> RangeStream:
        """Request a range, to be read as it arrives. Raises RegistryError."""
        check_range(self, offset, length)
        return self._client.open_range(
            self._repository,
            self._digest,
            offset,
            length,
            call or self.terms,
            size=self._size,
            aside=self._aside,
        )

    def _check_failed(self, offset: int, stop: int, now: float) -> None:
        for end, failed_offset, failed_stop, error in self._failed:
            if now < end and offset < failed_stop and failed_offset < stop:
                raise error.at(self.name, offset, 1)

    def evict(self, offset: int, length: int) -> None:
        """Distrust mirrors and proxies for this blob: the caller got wrong bytes. Nothing is cached here."""
        sources = self._client.distrust(self._repository, self._digest)
        log.warning(
            "%s: wrong bytes (%d at offset %d) from %s: fetched again, past mirrors and proxies",
            self._url,
            length,
            offset,
            sources,
        )
