"""Converting an image for several platforms: every image of an index, and the index itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from obdlab.convert.image import ConvertedImage, ConvertOptions, ConvertStoppedError, convert_manifest
from obdlab.convert.progress import Progress, Silent, Task
from obdlab.errors import FormatError
from obdlab.formats import oci

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource


#: Most memory of converting one image, with its compressing process, in bytes: measured 125 MiB for ``pydata``.
PLATFORM_MEMORY = 150 << 20


@dataclass(frozen=True, slots=True)
class ConvertedIndex:
    """All images, in the index's order; ``digest`` and ``document`` are the index's, or the only manifest's."""

    name: str
    digest: str
    document: bytes
    images: tuple[ConvertedImage, ...]


def convert_platforms(
    source: ImageSource,
    destination: ImageDestination,
    *,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    at_once: int = 2,
) -> ConvertedIndex:
    """Convert the image of every platform at ``source``, and store an index of them at ``destination``.

    BuildKit's attestations are left out, as they describe the original. Up to ``at_once`` images are converted at
    once, each with PLATFORM_MEMORY. The index is stored last, and not at all if one image fails. A source without an
    index gives one image. Raises as :func:`obdlab.convert.image.convert_image`.
    """
    options = options or ConvertOptions()
    progress = progress or Silent()
    root, document = source.root()
    if isinstance(document, oci.Manifest):
        assert root is not None
        image = convert_manifest(source, root, source.child(root), destination, options, progress)
        return ConvertedIndex(destination.name, image.digest, image.document, (image,))
    entries = _images(document)
    if not entries:
        raise FormatError("index has no images", blob=source.name)
    images = _convert_all(source, entries, destination, options, progress, at_once)
    index = oci.Index(
        manifests=tuple(_entry(entry, image) for entry, image in zip(entries, images, strict=True)),
        media_type=oci.DOCKER_INDEX if options.docker else oci.OCI_INDEX,
        annotations={} if options.docker else document.annotations,
        artifact_type=options.artifact_type if options.referrer and root else "",
        subject=oci.Descriptor(root.media_type, root.digest, root.size) if options.referrer and root else None,
    )
    data = index.to_bytes()
    stored = oci.Descriptor(index.media_type, oci.digest_of(data), len(data))
    destination.put_manifest(stored, data)
    return ConvertedIndex(destination.name, stored.digest, data, images)


def images_of(source: ImageSource) -> list[oci.Descriptor]:
    """Return the images of an index without attestations; empty for a source without an index. Raises as root()."""
    _, document = source.root()
    return _images(document) if isinstance(document, oci.Index) else []


def _images(index: oci.Index) -> list[oci.Descriptor]:
    return [entry for entry in index.manifests if entry.annotations.get(oci.REFERENCE_TYPE) != oci.ATTESTATION]


def _convert_all(
    source: ImageSource,
    entries: list[oci.Descriptor],
    destination: ImageDestination,
    options: ConvertOptions,
    progress: Progress,
    at_once: int,
) -> tuple[ConvertedImage, ...]:
    # Read before any work: an index with an entry that is not an image is refused at once.
    manifests = [source.child(entry) for entry in entries]
    stopped = threading.Event()

    def convert(entry: oci.Descriptor, manifest: oci.Manifest) -> ConvertedImage:
        watched = _Stoppable(progress, _platform_name(entry.platform), stopped)
        try:
            return convert_manifest(source, entry, manifest, destination, options, watched, tagged=False)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(at_once, "convert-platform") as threads:
        running = [threads.submit(convert, *pair) for pair in zip(entries, manifests, strict=True)]
        try:
            for future in running:
                future.exception()
        except BaseException:  # the user gave up
            stopped.set()
            raise
    failures = [error for error in (future.exception() for future in running) if error is not None]
    causes = [error for error in failures if not isinstance(error, ConvertStoppedError)]
    for error in (*causes, *failures):
        raise error
    return tuple(future.result() for future in running)


def _entry(entry: oci.Descriptor, image: ConvertedImage) -> oci.Descriptor:
    extra = {key: value for key, value in entry.extra.items() if key not in ("data", "urls")}
    return replace(
        entry, media_type=image.manifest.media_type, digest=image.digest, size=len(image.document), extra=extra
    )


def _platform_name(platform: oci.Platform | None) -> str:
    if platform is None:
        return "image"
    return "/".join(filter(None, (platform.os, platform.architecture, platform.variant)))


class _Stoppable:
    # Progress of one platform; reporting it raises once another platform has failed.
    def __init__(self, progress: Progress, name: str, stopped: threading.Event) -> None:
        self._progress = progress
        self._name = name
        self._stopped = stopped

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        self._check()
        with self._progress.task(f"{self._name} {name}", total) as task:
            yield _StoppableTask(task, self._check)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise ConvertStoppedError("conversion was stopped")


@dataclass(frozen=True, slots=True)
class _StoppableTask:
    _task: Task
    _check: Callable[[], None]

    def advance(self, amount: int) -> None:
        self._check()
        self._task.advance(amount)
