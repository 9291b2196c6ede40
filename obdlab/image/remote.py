"""Layer blobs that stay in their registry, read through the block cache."""

from __future__ import annotations

import hashlib
import logging
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from obdlab.blob import find, unwrapped
from obdlab.cache.ahead.allowance import Allowance
from obdlab.cache.ahead.download import BackgroundDownload, DownloadOptions
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.layout import DECOMPRESSED, PAGE
from obdlab.call import UNBOUND
from obdlab.command import command
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats.hashtree import Shape, TreeReference
from obdlab.formats.oci import check_digest
from obdlab.image.checkedblob import CheckedBlob
from obdlab.image.config import LowerConfig
from obdlab.image.registryaccess import open_client
from obdlab.image.treenodes import KeptNodes, TreeNodes
from obdlab.image.wholeblob import WholeBlob
from obdlab.observe.counters import LAZY_LAYERS
from obdlab.registry.p2p import TREE_HEADER
from obdlab.registry.reference import Repository
from obdlab.registry.remoteblob import RemoteBlob
from obdlab.settings.settings import VERIFY_OFF, VERIFY_REQUIRE
from obdlab.system.metered import metered

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from obdlab.blob import Around, Blob
    from obdlab.call import Call
    from obdlab.layers.spannedtarget import SpannedTarget
    from obdlab.registry.client import RegistryClient
    from obdlab.settings.settings import Settings


logger = logging.getLogger(__name__)


class UncheckedLayerError(ObdlabError, code="unchecked-layer"):
    """The settings require that a layer's bytes are checked, and its manifest has no hash tree for it."""


class RemoteLayers:
    """The blobs of one repository, through one client: they share its connections and its token.

    The client is closed when this object and all its blobs are closed. ``around`` gets the joints "origin" and
    "cache" of each blob. ``call`` has the terms of the requests and reads before :meth:`opened`.
    """

    def __init__(
        self, repo_blob_url: str, settings: Settings, around: Around = unwrapped, call: Call = UNBOUND
    ) -> None:
        self._around = around
        self._terms = call
        self._repository = Repository.from_blob_url(repo_blob_url)
        # The client's deadline is that of opening; each read of an opened blob has its own.
        self._client = open_client(replace(settings, read_deadline_s=settings.open_deadline_s))
        self._cache = BlockCache(
            settings.cache_dir,
            registry=self._repository.cache_name,
            quota=settings.cache_quota,
            min_free=settings.cache_min_free,
            unit=settings.cache_unit,
            extent=settings.cache_extent,
            extent_max=settings.cache_extent_max,
            readahead_max=settings.readahead_max,
            deadline_s=settings.open_deadline_s,
        )
        # Units of one page: a unit across the border of two spans would have to decompress both.
        self._contents = BlockCache(
            settings.cache_dir,
            registry=self._repository.cache_name + DECOMPRESSED,
            quota=settings.cache_quota,
            min_free=settings.cache_min_free,
            unit=PAGE,
            readahead_max=0,
            deadline_s=settings.open_deadline_s,
        )
        self._content_blobs: list[CachedBlob] = []
        #: The beginning of a blob is fetched in one request, in whole units of this size.
        self.cache_unit = settings.cache_unit
        self._settings = settings
        self._lock = threading.Lock()
        self._users = 1
        self._blobs: list[CachedBlob] = []
        self._origins: list[_Origin] = []
        self._kept = KeptNodes()
        self._checked: list[CheckedBlob] = []
        self._tree_origins: list[_Origin] = []
        self._tree_files: list[CachedBlob] = []
        self._layers = 0
        self._completion: BackgroundDownload | None = None
        self._too_large = False
        self._layer_blobs: list[CachedBlob] = []

    @property
    def origin(self) -> str:
        """The cache's name for the registry."""
        return self._repository.cache_name

    def open_layer(self, lower: LowerConfig, *, checked_above: bool = False) -> Blob:
        """Return the blob of a layer, each unit checked by the layer's hash tree if the settings allow that.

        With ``checked_above`` the caller checks what it reads, by other digests. Raises UncheckedLayerError if the
        settings require a tree and the layer has no tree, and as :meth:`open` does.
        """
        tree = TreeReference.parse(lower.hash_tree, f"hash tree of {lower.digest}") if lower.hash_tree else None
        if tree is None and not checked_above and self._settings.verify == VERIFY_REQUIRE:
            raise UncheckedLayerError(
                f"{self._repository}@{lower.digest}: no hash tree in the image's manifest, and the settings require "
                f"one (verify: {VERIFY_REQUIRE}); add it: {command('image', 'protect', 'IMAGE')}, or convert a "
                "turboOCI image again"
            )
        if self._settings.verify == VERIFY_OFF:
            tree = None
        LAZY_LAYERS.add(label="checked" if tree is not None or checked_above else "unchecked")
        return self.open(lower.digest, lower.size, tree)

    def open_target(self, digest: str, size: int, *, checked_above: bool) -> Blob:
        """Return the blob of an ordinary layer that a turboOCI layer points into. Raises as :meth:`open_layer`.

        At a registry that serves blobs only whole, the first read far inside fetches all of it into the cache. (Of
        other layers, the snapshotter has that done when it attaches their image.)
        """
        blob = self.open_layer(LowerConfig(digest=digest, size=size), checked_above=checked_above)
        cached = find(blob, CachedBlob)
        if cached is None:  # without a cache there is no place to keep it
            return blob
        settings = self._settings
        open_stream = partial(self._client.stream_blob, self._repository, digest, cached.size)
        return WholeBlob(blob, cached, open_stream, deadline_s=settings.read_deadline_s, most=settings.cache_quota)

    def open(self, digest: str, size: int, tree: TreeReference | None = None) -> Blob:
        """Return a blob of ``size`` bytes; if ``size`` is 0, the registry is asked for it.

        With ``tree`` every unit is checked before it is used. Raises FormatError for a malformed digest, SourceError
        if registry or cache cannot be used.
        """
        check_digest(digest, str(self._repository))
        size = size or self._client.blob_size(self._repository, digest, self._terms)
        if size == 0:
            raise FormatError("blob is empty", blob=f"{self._repository}@{digest}")
        origin = self._origin(digest, size, tree)
        blob: Blob = origin
        try:
            blob = self._around("origin", origin)
            nodes = None
            if tree is not None:
                nodes = self._nodes(origin, digest, tree)
                blob = checked = CheckedBlob(blob, nodes)
                self._checked.append(checked)
            blob = self._cache.open(blob, digest, nodes)
            self._origins.append(origin)
            if isinstance(blob, CachedBlob):
                blob.terms = self._terms
                self._blobs.append(blob)
            return self._around("cache", blob)
        except BaseException:
            blob.close()
            raise

    @property
    def keeps_content(self) -> bool:
        """True if the settings have the cache keep decompressed content."""
        return self._settings.cache_decompressed

    def cache_content(self, target: SpannedTarget, digest: str) -> Blob:
        """Return the content of a ``target``, the blob ``digest``, through the cache, as for :attr:`keeps_content`.

        It belongs to the result. The content depends on the index as well, which may come from any image: content is
        shared by images of the same index alone. Raises SourceError if the index cannot be read.
        """
        made_of = hashlib.sha256(f"{digest} {target.index_digest()}".encode()).hexdigest()
        blob = self._contents.open(target, f"sha256:{made_of}")
        if isinstance(blob, CachedBlob):
            self._content_blobs.append(blob)
        return blob

    def _origin(self, digest: str, size: int, tree: TreeReference | None = None) -> _Origin:
        with self._lock:
            self._users += 1
        aside = {} if tree is None else {TREE_HEADER: str(tree)}
        origin = _Origin(self._client, self._repository, digest, size, self.close, aside)
        origin.terms = self._terms
        return origin

    def _nodes(self, blob: Blob, digest: str, tree: TreeReference) -> TreeNodes:
        size = Shape(blob.size).file_size
        file: Blob | None = None
        origin: _Origin | None = None
        if size:
            origin = self._origin(tree.file, size)
            try:
                file = self._cache.open(origin, tree.file)
            except BaseException:
                origin.close()
                raise
            self._tree_origins.append(origin)
            if isinstance(file, CachedBlob):
                file.terms = self._terms
                self._tree_files.append(file)
        return TreeNodes(blob.name, digest, blob.size, tree, file, self._kept, origin)

    def opened(self) -> None:
        """End the opening: from now on, misses in the blobs fetch extents, with the deadline of reads.

        If configured, begin to download them whole in the background.
        """
        settings, self._terms = self._settings, UNBOUND
        self._layers, self._layer_blobs = len(self._origins), list(self._blobs)
        for origin in (*self._origins, *self._tree_origins):
            origin.deadline_s, origin.terms = settings.read_deadline_s, UNBOUND
        for blob in self._blobs:
            blob.opened(settings.read_deadline_s)
        for blob in self._content_blobs:
            blob.opened(settings.read_deadline_s, extents=False)
        for file in self._tree_files:
            # A node covers 8 MiB. Extents around it would take as long as the data that waits for it.
            file.opened(settings.read_deadline_s, extents=False)
        if settings.download_enabled or (settings.completion and settings.completion_at_once):
            self._fetch_all()

    def complete(self) -> None:
        """Begin to fetch all of the blobs in the spare time of the link, after a delay, if the settings say so.

        For the server of a device: a command that reads an image ends before the delay. Does nothing while the blobs
        are being fetched, or are whole.
        """
        ended = self._completion is None or (self._completion.wait(0) and self.unverified() > 0)
        if self._settings.completion and ended and not self._too_large:
            self._fetch_all()

    # Not if it is larger than the cache.
    def _fetch_all(self) -> None:
        settings = self._settings
        blobs = [*self._blobs, *self._tree_files]
        total = sum(blob.size for blob in blobs)
        if not self._blobs:
            return
        if settings.cache_quota and total > settings.cache_quota:
            self._too_large = True
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
        at_once = settings.completion_at_once
        if settings.completion and (at_once or not settings.download_enabled):
            allowance = Allowance(self._cache.space, settings.completion_bytes_per_day)
            make_room = self._cache.space.make_room
            options = replace(options, at_once=at_once, allowance=allowance, metered=metered, room=make_room)
        download = BackgroundDownload(blobs, options)
        try:
            download.start()
        except RuntimeError as error:  # no more threads, for now
            logger.warning("%s: not downloaded: %s", self._repository, error)
        else:
            self._completion = download

    def unverified(self) -> int:
        """Return how many of the blobs at :meth:`opened` are not in the cache whole and verified."""
        return self._layers - sum(blob.verified for blob in self._layer_blobs)

    def statistics(self) -> dict[str, int]:
        """Return the sums of the block cache's counters for these blobs, and the wrong units that were fetched."""
        return self._cache.statistics() | {"wrong_units": sum(blob.wrong_units for blob in self._checked)}

    def close(self) -> None:
        """Release the client: once for this object, once for each blob. The last call closes it."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._client.close()


class _Origin(RemoteBlob):
    # Releases the shared client when it is closed, once.
    def __init__(
        self,
        client: RegistryClient,
        repository: Repository,
        digest: str,
        size: int,
        release: Callable[[], None],
        aside: Mapping[str, str],
    ) -> None:
        super().__init__(client, repository, digest, size, aside=aside)
        self._release: Callable[[], None] | None = release

    def close(self) -> None:
        super().close()
        release, self._release = self._release, None
        if release is not None:
            release()
