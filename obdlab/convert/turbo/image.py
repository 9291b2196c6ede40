"""The layers of a turboOCI image: built, read back, and only then stored."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.convert.layer import BuiltLayer, TurboTarget
from obdlab.convert.pipeline import ConvertedLayer
from obdlab.convert.turbo.archive import write_turbo_blob
from obdlab.convert.turbo.builder import TurboBuilder
from obdlab.convert.workdir import work_directory
from obdlab.errors import FormatError, SourceError
from obdlab.formats import oci
from obdlab.formats.turbofiles import GZIP_INDEX, SUMS_FILE, TARGET_FILE, ZSTD_INDEX, NamedTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.convert.endpoints.layout import VerifiedFile
    from obdlab.convert.layer import LayerOptions
    from obdlab.convert.pipeline import Group
    from obdlab.convert.progress import Progress

_DOCKER = "application/vnd.docker."


def convert_to_turbo(
    source: ImageSource,
    destination: ImageDestination,
    groups: Sequence[Group],
    describe: Callable[[BuiltLayer], oci.Descriptor],
    options: LayerOptions,
    filesystems: Sequence[str],
    progress: Progress,
    parent: Path,
    *,
    several_members: bool = False,
    zstd: bool = False,
) -> tuple[ConvertedLayer, ...]:
    """Build a turboOCI layer for each group, which must be one layer, and store them all once all are verified.

    Blobs are built in a directory below ``parent``; ``filesystems`` are those that each blob has. The ordinary layers
    must be at the destination, or it must be one that keeps blobs without a manifest, and then gets them.
    ``several_members`` allows layers of several gzip members, and ``zstd`` zstd layers: the original refuses both.
    Raises FormatError for an image that cannot be one, TurboVerificationError, and the errors of both endpoints.
    """
    _check(source, destination, groups)
    with work_directory(parent) as work_dir, ExitStack() as ended:
        fetchers = ended.enter_context(ThreadPoolExecutor(1, "turbo-fetch"))
        fetches: dict[int, Future[VerifiedFile]] = {}
        ended.callback(_release, source, fetches)
        ended.callback(fetchers.shutdown, cancel_futures=True)

        def fetch(number: int) -> VerifiedFile:
            layer = groups[number].layers[0]
            directory = work_dir / f"fetch-{number:03d}"
            directory.mkdir()
            with progress.task(f"layer {number}: fetch", layer.size) as task:
                return source.fetch(layer, directory, task.advance)

        finished: list[tuple[BuiltLayer, Path]] = []
        with TurboBuilder(work_dir, options, filesystems, several_members=several_members, zstd=zstd) as builder:
            for number, group in enumerate(groups):
                for ahead in (number, number + 1):
                    if ahead < len(groups) and ahead not in fetches:
                        fetches[ahead] = fetchers.submit(fetch, ahead)
                layer = group.layers[0]
                file = fetches[number].result()
                with progress.task(f"layer {number}: build", layer.size) as task:
                    name = f"{source.name} layer {number} ({layer.digest})"
                    made = builder.add(file, name, group.diff_ids[0], task.advance)
                named = work_dir / f"{number:03d}{TARGET_FILE}"
                named.write_bytes(NamedTarget(layer.digest, layer.size).to_bytes())
                path = work_dir / f"{number:03d}.tar.gz"
                blob = write_turbo_blob(path, {**made.files, TARGET_FILE: named})
                sums = digest_of_file(made.files[SUMS_FILE])
                target = TurboTarget(layer.digest, _media_type(layer, made.files), blob.diff_id, sums)
                built = BuiltLayer(
                    path, blob.digest, blob.size, made.records, made.own_size, made.applied, made.seconds, target
                )
                finished.append((built, path))
            builder.verify()
        stored = []
        for number, (group, (built, path)) in enumerate(zip(groups, finished, strict=True)):
            if destination.place is not None and destination.place == source.place:
                if not destination.has(group.layers[0]):  # asking keeps it where there is a garbage collector
                    raise SourceError("layer is not there any more", blob=f"{source.name}@{group.layers[0].digest}")
            else:
                with (
                    progress.task(f"layer {number}: keep", group.layers[0].size) as task,
                    fetches[number].result().own_file(work_dir) as whole,
                ):
                    destination.put_file(group.layers[0], whole, task.advance)
            with progress.task(f"layer {number}: push", built.size) as task:
                new = destination.put_file(describe(built), path, task.advance)
            stored.append(ConvertedLayer.of(group, built, stored=new))
        return tuple(stored)


def _check(source: ImageSource, destination: ImageDestination, groups: Sequence[Group]) -> None:
    if any(len(group.layers) > 1 for group in groups):
        raise FormatError("layers of a turboOCI image cannot be merged (--flatten)", blob=source.name)
    if not destination.keeps_unnamed and (destination.place is None or destination.place != source.place):
        raise FormatError(
            "a turboOCI image must be in the repository of the image it is made of, which holds its files: copy that "
            "image there first, or convert it as a whole (without --as turbo-oci)",
            blob=destination.name,
            got=source.name,
            wanted="a source in the same repository",
        )


# The original names the type that it found, in the family of the type that the source's manifest names.
def _media_type(layer: oci.Descriptor, files: Mapping[str, Path]) -> str:
    docker = layer.media_type.startswith(_DOCKER)
    if ZSTD_INDEX in files:
        return oci.DOCKER_LAYER_ZSTD if docker else oci.OCI_LAYER_ZSTD
    if GZIP_INDEX in files:
        return oci.DOCKER_LAYER_GZIP if docker else oci.OCI_LAYER_GZIP
    return oci.DOCKER_LAYER if docker else oci.OCI_LAYER


def _release(source: ImageSource, fetches: dict[int, Future[VerifiedFile]]) -> None:
    for fetch in fetches.values():
        if fetch.done() and not fetch.cancelled() and fetch.exception() is None:
            source.release(fetch.result())
