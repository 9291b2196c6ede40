"""A whole image: every layer of an OCI image as an overlaybd layer, with config and manifest, at its destination."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.decompress import uncompressed
from obdlab.convert.layer import FS_TYPE, BuiltLayer, LayerBuilder, LayerOptions, PendingLayer, layer_uuid
from obdlab.convert.layout import VerifiedFile
from obdlab.convert.progress import Progress, Silent
from obdlab.convert.workdir import work_directory
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats import oci
from obdlab.formats.lsmt.index import MAX_LAYERS
from obdlab.registry.platforms import host_platform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obdlab.convert.source import ImageDestination, ImageSource

# Not /tmp, which may be memory.
_DEFAULT_WORK_DIR = Path("/var/tmp")
_FETCHERS = 2
_PUSHERS = 2


class ConvertStoppedError(ObdlabError):
    """A part of a conversion ended because another part failed or the user gave up."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How an image is converted."""

    layer: LayerOptions = field(default_factory=LayerOptions)
    #: Which image of an index; this machine's if not given.
    platform: oci.Platform | None = None
    #: Docker's media types instead of OCI's.
    docker: bool = False
    #: Name the source as the new manifest's subject, so that a registry lists the new one as referring to it.
    referrer: bool = False
    #: Where layers are built; takes all of them, uncompressed and compressed.
    work_dir: Path = _DEFAULT_WORK_DIR


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """One layer: where it came from, and what came out. Sizes in bytes."""

    source_digest: str
    source_size: int
    built: BuiltLayer
    #: False if the destination had the blob already.
    stored: bool


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """The finished image; ``digest`` is that of its manifest, ``document`` the manifest as stored."""

    name: str
    digest: str
    document: bytes
    manifest: oci.Manifest
    platform: oci.Platform
    layers: tuple[ConvertedLayer, ...]
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of all layer blobs."""
        return sum(layer.built.size for layer in self.layers)


def convert_image(
    source: ImageSource,
    destination: ImageDestination,
    *,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> ConvertedImage:
    """Convert the image at ``source`` and store it at ``destination``.

    Layers are built one on another; downloads of later and uploads of finished layers go on meanwhile. The manifest
    is stored last, so the destination never names an incomplete image. Of an index, one platform is converted.
    Raises ObdlabError of the kind that fits: SourceError and CorruptBlobError for source and destination,
    FormatError for what is malformed (naming layer and offset), ApplyError. No file is left on this machine then.
    """
    options = options or ConvertOptions()
    descriptor, manifest = source.find(options.platform or host_platform())
    return convert_manifest(source, descriptor, manifest, destination, options, progress or Silent())


def convert_manifest(
    source: ImageSource,
    descriptor: oci.Descriptor,
    manifest: oci.Manifest,
    destination: ImageDestination,
    options: ConvertOptions,
    progress: Progress,
    *,
    tagged: bool = True,
) -> ConvertedImage:
    """Convert one manifest of ``source``, which ``descriptor`` names; as :func:`convert_image` otherwise.

    Without ``tagged`` it is stored by its digest only.
    """
    if options.docker and options.referrer:
        raise FormatError("docker's manifests cannot refer to another", blob=destination.name)
    begin = time.monotonic()
    config = source.config(manifest)
    _check_platform(source.name, config.platform, options.platform)
    if not 1 <= len(manifest.layers) <= MAX_LAYERS:
        raise FormatError(
            "image has a number of layers that no device can stack",
            blob=source.name,
            got=len(manifest.layers),
            wanted=f"1 to {MAX_LAYERS}",
        )
    with work_directory(options.work_dir) as work_dir:
        conversion = _Conversion(source, destination, options, progress, work_dir)
        layers = conversion.run(manifest, config)
    subject = oci.Descriptor(descriptor.media_type, descriptor.digest, descriptor.size) if options.referrer else None
    converted = _store_config(destination, manifest, config, [layer.built for layer in layers], options, subject)
    data = converted.to_bytes()
    stored = oci.Descriptor(converted.media_type, oci.digest_of(data), len(data), platform=config.platform)
    destination.put_manifest(stored, data, tagged=tagged)
    seconds = time.monotonic() - begin
    return ConvertedImage(destination.name, stored.digest, data, converted, config.platform, layers, seconds)


# An index was asked for the platform; a manifest without one has it in its config only.
def _check_platform(name: str, got: oci.Platform, wanted: oci.Platform | None) -> None:
    if wanted is None or (got.os, got.architecture) == (wanted.os, wanted.architecture):
        return
    raise FormatError(
        "image is not for this platform",
        blob=name,
        got=f"{got.os or '?'}/{got.architecture or '?'}",
        wanted=f"{wanted.os}/{wanted.architecture}",
    )


class _Conversion:
    # One run: its layers in order, with a thread or two that fetch ahead and push behind.

    def __init__(
        self,
        source: ImageSource,
        destination: ImageDestination,
        options: ConvertOptions,
        progress: Progress,
        work_dir: Path,
    ) -> None:
        self._source = source
        self._destination = destination
        self._options = options
        self._progress = progress
        self._work_dir = work_dir
        self._builder = LayerBuilder(work_dir, options.layer)
        self._fetches: list[Future[VerifiedFile]] = []
        self._stopped = threading.Event()

    def run(self, manifest: oci.Manifest, config: oci.Config) -> tuple[ConvertedLayer, ...]:
        with ExitStack() as ended:
            ended.callback(self._release_fetched)
            ended.enter_context(self._builder)
            pushers = ended.enter_context(ThreadPoolExecutor(_PUSHERS, "convert-push"))
            fetchers = ended.enter_context(ThreadPoolExecutor(_FETCHERS, "convert-fetch"))
            try:
                stored = self._run(manifest, config, fetchers, pushers)
            except BaseException:
                self._stopped.set()
                for pool in (fetchers, pushers):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise
        return tuple(
            ConvertedLayer(layer.digest, layer.size, built, new)
            for layer, (built, new) in zip(manifest.layers, stored, strict=True)
        )

    def _run(
        self, manifest: oci.Manifest, config: oci.Config, fetchers: ThreadPoolExecutor, pushers: ThreadPoolExecutor
    ) -> list[tuple[BuiltLayer, bool]]:
        uuids = [layer_uuid(chain) for chain in oci.chain_ids(config.diff_ids)]
        pushes: list[Future[tuple[BuiltLayer, bool]]] = []
        for number, layer in enumerate(manifest.layers):
            # One ahead: more would only fill the disk.
            for ahead in range(len(self._fetches), min(number + 2, len(manifest.layers))):
                self._fetches.append(fetchers.submit(self._fetch, ahead, manifest.layers[ahead]))
            file = self._fetches[number].result()
            parent_uuid = uuids[number - 1] if number else None
            built = self._build(number, layer, file, config.diff_ids[number], uuids[number], parent_uuid)
            pushes.append(pushers.submit(self._push, number, built))
            for push in pushes:
                if push.done():
                    push.result()  # a failed upload ends all now
        return [push.result() for push in pushes]

    def _fetch(self, number: int, layer: oci.Descriptor) -> VerifiedFile:
        directory = self._work_dir / f"fetch-{number:03d}"
        directory.mkdir()
        with self._progress.task(f"layer {number}: fetch", layer.size) as task:
            return self._source.fetch(layer, directory, self._unless_stopped(task.advance))

    def _build(
        self, number: int, layer: oci.Descriptor, file: VerifiedFile, diff_id: str, uuid: str, parent: str | None
    ) -> PendingLayer:
        blob = f"{self._source.name} layer {number} ({layer.digest})"
        with self._progress.task(f"layer {number}: build", layer.size) as task:
            tar = uncompressed(file, blob, diff_id, task.advance)
            built = self._builder.build(tar, blob=blob, uuid=uuid, parent_uuid=parent)
        self._source.release(file)
        return built

    def _push(self, number: int, pending: PendingLayer) -> tuple[BuiltLayer, bool]:
        layer = pending.result()
        with self._progress.task(f"layer {number}: push", layer.size) as task:
            descriptor = _layer_descriptor(layer, self._options)
            return layer, self._destination.put_file(descriptor, layer.path, self._unless_stopped(task.advance))

    def _release_fetched(self) -> None:
        for fetch in self._fetches:
            if fetch.done() and not fetch.cancelled() and fetch.exception() is None:
                self._source.release(fetch.result())

    def _unless_stopped(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        def checked(amount: int) -> None:
            if self._stopped.is_set():
                raise ConvertStoppedError("conversion was stopped")
            advance(amount)

        return checked


def _store_config(
    destination: ImageDestination,
    source: oci.Manifest,
    config: oci.Config,
    layers: Sequence[BuiltLayer],
    options: ConvertOptions,
    subject: oci.Descriptor | None,
) -> oci.Manifest:
    config_bytes = config.with_diff_ids([layer.digest for layer in layers]).to_bytes()
    config_type = oci.DOCKER_CONFIG if options.docker else oci.OCI_CONFIG
    config_descriptor = oci.Descriptor(config_type, oci.digest_of(config_bytes), len(config_bytes))
    manifest = oci.Manifest(
        config=config_descriptor,
        layers=tuple(_layer_descriptor(layer, options) for layer in layers),
        media_type=oci.DOCKER_MANIFEST if options.docker else oci.OCI_MANIFEST,
        # Docker's type has no annotations.
        annotations={} if options.docker else source.annotations,
        artifact_type="" if subject is None else oci.NATIVE_ARTIFACT,
        subject=subject,
    )
    destination.put_bytes(config_descriptor, config_bytes)
    return manifest


def _layer_descriptor(layer: BuiltLayer, options: ConvertOptions) -> oci.Descriptor:
    return oci.Descriptor(
        media_type=oci.DOCKER_LAYER if options.docker else oci.OCI_LAYER,
        digest=layer.digest,
        size=layer.size,
        annotations={
            oci.OVERLAYBD_VERSION: oci.VERSION_NATIVE,
            oci.BLOB_DIGEST: layer.digest,
            oci.BLOB_SIZE: str(layer.size),
            oci.BLOB_FS_TYPE: FS_TYPE,
        },
    )
