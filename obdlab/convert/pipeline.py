"""The layers of one image: fetched, built one on another, compressed and pushed, all at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obdlab.convert.apply import ApplyStatistics
from obdlab.convert.database import LayerRecord
from obdlab.convert.decompress import uncompressed
from obdlab.convert.layer import BuiltLayer, LayerBuilder, layer_uuid
from obdlab.errors import ObdlabError
from obdlab.formats import oci
from obdlab.formats.lsmt.layout import NULL_UUID
from obdlab.layers.lsmt import open_layer
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from obdlab.blob import Blob, Buffer
    from obdlab.convert.base import Below
    from obdlab.convert.database import LayerKey
    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.convert.endpoints.layout import VerifiedFile
    from obdlab.convert.layer import LayerOptions, PendingLayer
    from obdlab.convert.progress import Progress
    from obdlab.convert.reuse import Reuse, Reused
    from obdlab.convert.storedtrees import StoredTrees

_FETCHERS = 2
_PUSHERS = 2
# Smallest layer for which starting a process pays off.
_LARGE = 1 << 20


class ConvertStoppedError(ObdlabError):
    """A part of a conversion ended because another part failed or the user gave up."""


@dataclass(frozen=True, slots=True)
class Group:
    """The OCI layers that become one layer, mostly a single one, bottom first."""

    layers: tuple[oci.Descriptor, ...]
    diff_ids: tuple[str, ...]
    #: Chain ID of the topmost layer.
    chain_id: str
    #: Number of the lowest layer in the image.
    first: int


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """One layer: its source and its result. Sizes in bytes."""

    #: Digest of the topmost OCI layer, number of OCI layers, and their size.
    source_digest: str
    merged: int
    source_size: int
    built: BuiltLayer
    #: False if the destination had the blob already.
    stored: bool
    #: The place in which a reused layer was found; "" for a built one.
    reused: str = ""

    @classmethod
    def of(cls, group: Group, built: BuiltLayer, *, stored: bool, reused: str = "") -> ConvertedLayer:
        """Return the layer made of ``group``."""
        size = sum(layer.size for layer in group.layers)
        return cls(group.layers[-1].digest, len(group.layers), size, built, stored, reused)

    @classmethod
    def known(cls, group: Group, layer: oci.Descriptor) -> ConvertedLayer:
        """Return a layer of a manifest that the destination had; only its descriptor is known."""
        tree = layer.annotations.get(oci.HASH_TREE, "")
        built = BuiltLayer(None, layer.digest, layer.size, 0, 0, ApplyStatistics(), hash_tree=tree)
        return cls.of(group, built, stored=False, reused="image was there")


def groups_of(manifest: oci.Manifest, config: oci.Config, most: int, first: int = 0) -> list[Group]:
    """Group the OCI layers from ``first`` on into the layers to make, at most ``most``: the last takes all remaining.

    ``most`` 0: no limit.
    """
    chains = oci.chain_ids(config.diff_ids)
    count = len(manifest.layers)
    ends = list(range(first + 1, count + 1))
    if 0 < most < count - first:
        ends = [*ends[: most - 1], count]
    begins = [first, *ends][: len(ends)]
    return [
        Group(manifest.layers[begin:end], config.diff_ids[begin:end], chains[end - 1], begin)
        for begin, end in zip(begins, ends, strict=True)
    ]


class Pipeline:
    """One run: layers in order, with threads that fetch the next and push finished ones."""

    def __init__(
        self,
        source: ImageSource,
        destination: ImageDestination,
        reuse: Reuse,
        options: LayerOptions,
        describe: Callable[[BuiltLayer], oci.Descriptor],
        progress: Progress,
        work_dir: Path,
        base: Below | None = None,
        trees: StoredTrees | None = None,
    ) -> None:
        self._source = source
        self._trees = trees
        self._destination = destination
        self._reuse = reuse
        self._describe = describe
        self._progress = progress
        self._work_dir = work_dir
        self._options = options
        # Below all groups.
        self._base = base
        self._fetches: dict[int, Future[VerifiedFile]] = {}
        self._pushes: list[Future[ConvertedLayer]] = []
        self._stopped = threading.Event()

    def run(self, groups: Sequence[Group]) -> tuple[ConvertedLayer, ...]:
        """Convert all layers and store them. Raises the first failure; layers built until then are kept."""
        found = self._find(groups)
        with ExitStack() as ended:
            ended.callback(self._release_fetched)
            to_build = [layer for group in groups[len(found) :] for layer in group.layers]
            large = any(layer.size >= _LARGE for layer in to_build)
            builder = ended.enter_context(LayerBuilder(self._work_dir, self._options, large=large))
            pushers = ended.enter_context(ThreadPoolExecutor(_PUSHERS, "convert-push"))
            fetchers = ended.enter_context(ThreadPoolExecutor(_FETCHERS, "convert-fetch"))
            try:
                return self._run(groups, found, builder, fetchers, pushers)
            except BaseException:
                self._stopped.set()
                for pool in (fetchers, pushers):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _find(self, groups: Sequence[Group]) -> list[tuple[LayerKey, Reused]]:
        # From the bottom up: all layers above one that must be built must be built, too.
        found: list[tuple[LayerKey, Reused]] = []
        for number in range(len(groups)):
            key = self._key(groups, number, [*self._base_digests(), *(reused.record.digest for _, reused in found)])
            reused = self._reuse.find(key)
            if reused is None:
                break
            found.append((key, reused))
        return found

    def _key(self, groups: Sequence[Group], number: int, below: Sequence[str]) -> LayerKey:
        parent = groups[number - 1].chain_id if number else ""
        return self._reuse.key(groups[number].chain_id, parent, len(groups[number].layers), below)

    def _run(
        self,
        groups: Sequence[Group],
        found: Sequence[tuple[LayerKey, Reused]],
        builder: LayerBuilder,
        fetchers: ThreadPoolExecutor,
        pushers: ThreadPoolExecutor,
    ) -> tuple[ConvertedLayer, ...]:
        for group, (key, reused) in zip(groups, found, strict=False):
            self._pushes.append(pushers.submit(self._push_reused, group, key, reused))
        base_uuid = None
        if len(found) < len(groups):
            base_uuid = self._add_base(builder)
            for _, reused in found:
                builder.add_lower(open_layer(self._open(reused)))
        wanted = [(g.first + n, layer) for g in groups[len(found) :] for n, layer in enumerate(g.layers)]
        fetching = _Ahead(lambda number, layer: fetchers.submit(self._fetch, number, layer), wanted, self._fetches)
        digests = [*self._base_digests(), *(reused.record.digest for _, reused in found)]
        pending: list[PendingLayer] = []
        for number, group in enumerate(groups[len(found) :], len(found)):
            parent = layer_uuid(groups[number - 1].chain_id) if number else base_uuid
            pending.append(self._build(builder, group, parent, fetching))
            self._pushes.append(pushers.submit(self._push_built, groups, number, digests, tuple(pending)))
            for push in self._pushes:
                if push.done():
                    push.result()  # raises now if the upload failed
        return tuple(push.result() for push in self._pushes)

    def _open(self, reused: Reused) -> Blob:
        if reused.path is not None:
            return LocalFile(reused.path)
        descriptor = oci.Descriptor(oci.OCI_LAYER, reused.record.digest, reused.record.size)
        return self._destination.open_blob(descriptor)

    def _fetch(self, number: int, layer: oci.Descriptor) -> VerifiedFile:
        directory = self._work_dir / f"fetch-{number:03d}"
        directory.mkdir()
        with self._progress.task(f"layer {number}: fetch", layer.size) as task:
            return self._source.fetch(layer, directory, self._unless_stopped(task.advance))

    def _base_digests(self) -> list[str]:
        return [] if self._base is None else self._base.digests

    def _add_base(self, builder: LayerBuilder) -> str | None:
        # Returns the UUID of its top layer.
        uuid = NULL_UUID
        for layer in [] if self._base is None else self._base.open(self._options.virtual_size):
            builder.add_lower(layer)
            uuid = layer.uuid
        return None if uuid == NULL_UUID else uuid

    def _build(self, builder: LayerBuilder, group: Group, parent_uuid: str | None, fetching: _Ahead) -> PendingLayer:
        def tars() -> Iterator[tuple[str, Iterator[Buffer]]]:
            for number, (layer, diff_id) in enumerate(zip(group.layers, group.diff_ids, strict=True), group.first):
                blob = f"{self._source.name} layer {number} ({layer.digest})"
                file = fetching.take(number)
                with self._progress.task(f"layer {number}: build", layer.size) as task:
                    yield blob, uncompressed(file, blob, diff_id, task.advance)
                self._source.release(file)

        return builder.build(tars(), uuid=layer_uuid(group.chain_id), parent_uuid=parent_uuid)

    def _push_built(
        self, groups: Sequence[Group], number: int, digests: Sequence[str], pending: Sequence[PendingLayer]
    ) -> ConvertedLayer:
        # Layers are compressed in order: those below are finished before this one.
        *below, layer = [layer.result() for layer in pending]
        assert layer.path is not None
        key = self._key(groups, number, [*digests, *(lower.digest for lower in below)])
        record = LayerRecord(layer.digest, layer.size, layer.segments, layer.data_size)
        self._reuse.made(key, layer.path, record)
        stored = self._push(number, layer, layer.path)
        self._reuse.stored(key, record)
        return ConvertedLayer.of(groups[number], self._with_tree(layer), stored=stored)

    def _push_reused(self, group: Group, key: LayerKey, reused: Reused) -> ConvertedLayer:
        record = reused.record
        layer = BuiltLayer(
            reused.path, record.digest, record.size, record.segments, record.data_size, ApplyStatistics()
        )
        stored = False
        if reused.path is not None:
            stored = self._push(group.first, layer, reused.path)
            self._reuse.stored(key, record)
        return ConvertedLayer.of(group, self._with_tree(layer), stored=stored, reused=reused.where)

    # After the layer is stored: an error in between leaves no tree without its layer.
    def _with_tree(self, layer: BuiltLayer) -> BuiltLayer:
        if self._trees is None:
            return layer
        described, path = self._describe(layer), layer.path
        tree = self._trees.of_stored(described) if path is None else self._trees.of_file(described, path)
        return replace(layer, hash_tree=tree)

    def _push(self, number: int, layer: BuiltLayer, path: Path) -> bool:
        with self._progress.task(f"layer {number}: push", layer.size) as task:
            return self._destination.put_file(self._describe(layer), path, self._unless_stopped(task.advance))

    def _release_fetched(self) -> None:
        for fetch in self._fetches.values():
            if fetch.done() and not fetch.cancelled() and fetch.exception() is None:
                self._source.release(fetch.result())

    def _unless_stopped(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        def checked(amount: int) -> None:
            if self._stopped.is_set():
                raise ConvertStoppedError("conversion was stopped")
            advance(amount)

        return checked


class _Ahead:
    # Layers in order: one is fetched while one is built; more would only fill the disk.
    def __init__(
        self,
        start: Callable[[int, oci.Descriptor], Future[VerifiedFile]],
        wanted: Sequence[tuple[int, oci.Descriptor]],
        started: dict[int, Future[VerifiedFile]],
    ) -> None:
        self._start = start
        self._waiting = list(reversed(wanted))
        self._started = started

    def take(self, number: int) -> VerifiedFile:
        while self._waiting and self._waiting[-1][0] <= number + 1:
            ahead, layer = self._waiting.pop()
            self._started[ahead] = self._start(ahead, layer)
        return self._started[number].result()
