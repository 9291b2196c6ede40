"""Layer blobs that stay in their registry, read through the block cache."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from obdlab.blob import unwrapped
from obdlab.cache.ahead.download import BackgroundDownload, DownloadOptions
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.errors import FormatError
from obdlab.formats.oci import check_digest
from obdlab.image.registryaccess import open_client
from obdlab.registry.reference import Repository
from obdlab.registry.remoteblob import RemoteBlob

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Around, Blob
    from obdlab.registry.client import RegistryClient
    from obdlab.settings.settings import Settings


logger = logging.getLogger(__name__)


class RemoteLayers:
    """The blobs of one repository, through one client: they share its connections and its token.

    The client is closed when this object and all its blobs are closed. ``around`` gets the joints "origin" and
    "cache" of each blob.
    """

    def __init__(self, repo_blob_url: str, settings: Settings, around: Around = unwrapped) -> None:
        self._around = around
        self._repository = Repository.from_blob_url(repo_blob_url)
        # The client's deadline is that of opening; each read of an opened blob has its own.
        self._client = open_client(replace(settings, read_deadline_s=settings.open_deadline_s))
        self._cache = BlockCache(
            settings.cache_dir,
            registry=cache_name(self._repository),
            quota=settings.cache_quota,
            min_free=settings.cache_min_free,
            unit=settings.cache_unit,
            extent=settings.cache_extent,
            extent_max=settings.cache_extent_max,
            readahead_max=settings.readahead_max,
            deadline_s=settings.open_deadline_s,
        )
        #: The beginning of a blob is fetched in one request, in whole units of this size.
        self.cache_unit = settings.cache_unit
        self._settings = settings
        self._lock = threading.Lock()
        self._users = 1
        self._blobs: list[CachedBlob] = []
        self._origins: list[_Origin] = []
        self._layers = 0
        self._layer_blobs: list[CachedBlob] = []

    def open(self, digest: str, size: int) -> Blob:
        """Return a blob of ``size`` bytes; if ``size`` is 0, the registry is asked for it.

        Raises FormatError for a malformed digest, SourceError if registry or cache cannot be used.
        """
        check_digest(digest, str(self._repository))
        size = size or self._client.blob_size(self._repository, digest)
        if size == 0:
            raise FormatError("blob is empty", blob=f"{self._repository}@{digest}")
        with self._lock:
            self._users += 1
        origin = _Origin(self._client, self._repository, digest, size, self.close)
        blob: Blob = origin
        try:
            blob = self._around("origin", origin)
            blob = self._cache.open(blob, digest)
            self._origins.append(origin)
            if isinstance(blob, CachedBlob):
                self._blobs.append(blob)
            return self._around("cache", blob)
        except BaseException:
            blob.close()
            raise

    def opened(self) -> None:
        """End the opening: from now on, misses in the blobs fetch extents, with the deadline of reads.

        If configured, begin to download them whole in the background, unless they exceed the cache's quota.
        """
        settings = self._settings
        self._layers, self._layer_blobs = len(self._origins), list(self._blobs)
        for origin in self._origins:
            origin.deadline_s = settings.read_deadline_s
        for blob in self._blobs:
            blob.opened(settings.read_deadline_s)
        total = sum(blob.size for blob in self._blobs)
        if not settings.download_enabled or not self._blobs:
            return
        if settings.cache_quota and total > settings.cache_quota:
            logger.warning(
                "%s: not downloaded, larger than the cache (got %d bytes, wanted at most %d)",
                self._repository,
                total,
                settings.cache_quota,
            )
            return
        options = DownloadOptions(
            settings.download_delay_s,
            settings.download_delay_extra_s,
            settings.download_bytes_per_s,
            settings.download_tries,
        )
        BackgroundDownload(self._blobs, options).start()

    def unverified(self) -> int:
        """Return how many of the blobs at :meth:`opened` are not in the cache whole and verified."""
        return self._layers - sum(blob.verified for blob in self._layer_blobs)

    def statistics(self) -> dict[str, int]:
        """Return the sums of the block cache's counters for these blobs."""
        return self._cache.statistics()

    def close(self) -> None:
        """Release the client: once for this object, once for each blob. The last call closes it."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._client.close()


def cache_name(repository: Repository) -> str:
    """Return the cache's name for the origin of the repository's blobs: its registry, over TLS or not."""
    return repository.api_host.lower() + ("+http" if repository.plain_http else "")


class _Origin(RemoteBlob):
    # Releases the shared client when it is closed, once.
    def __init__(
        self, client: RegistryClient, repository: Repository, digest: str, size: int, release: Callable[[], None]
    ) -> None:
        super().__init__(client, repository, digest, size)
        self._release: Callable[[], None] | None = release

    def close(self) -> None:
        super().close()
        release, self._release = self._release, None
        if release is not None:
            release()
