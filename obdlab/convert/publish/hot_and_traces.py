"""Publishing traces of an image's starts: as a hot layer, an acceleration layer, or an artifact that refers to it.

The first two make another image, with one more layer; the third does not change the image or its digest.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.compare.imagetree import fetched_layers
from obdlab.convert.endpoints.disks import unpacked
from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.convert.endpoints.registryimages import RegistrySource
from obdlab.convert.progress import Silent
from obdlab.convert.publish.extend import TopLayer, add_layer, manifest_of
from obdlab.errors import FormatError, SourceError
from obdlab.formats import oci
from obdlab.formats.trace import layer_of_content
from obdlab.image.from_manifest import CREATED, TRACE_ARTIFACT, config_from_manifest
from obdlab.image.open import open_image
from obdlab.image.turboblob import file_systems_in
from obdlab.layerfiles.writing import Packing, write_packed
from obdlab.layers.stack import Stack, WritableStack
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.traces.hotlayer import is_hot, write_hot_layer
from obdlab.traces.replay import reads_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.convert.progress import Progress
    from obdlab.registry.client import RegistryClient
    from obdlab.settings.settings import Settings

# A start waits for these bytes, so their number counts more than the speed of decompression. Larger blocks and higher
# levels of zstd compress better: this level, the highest without great need of memory, gives 11 % less than level 3,
# at a 70th of the speed, once. (Blocks of 64 KiB that do not compress have no room in the original's reader.)
HOT_LEVEL = 19
HOT_PACKING = Packing("zstd", 32 << 10, tar=True, level=HOT_LEVEL)
_PLACE = "/var/tmp"


def add_hot_layer(
    source: ImageSource,
    destination: ImageDestination,
    trace: bytes,
    settings: Settings,
    *,
    client: RegistryClient | None = None,
    packing: Packing = HOT_PACKING,
    platform: oci.Platform | None = None,
    work_dir: Path = Path("/var/tmp"),
    progress: Progress | None = None,
    trace_name: str = "trace",
) -> tuple[oci.Descriptor, int]:
    """Store ``source`` at ``destination`` with a hot layer of the reads in ``trace`` (or a priority list).

    Returns the manifest's descriptor, and the size of the hot layer's blob. From an image in a registry, read with
    ``client``, only these ranges are fetched. Raises FormatError and CorruptBlobError for trace or image.
    """
    manifest = manifest_of(source, platform)
    with tempfile.TemporaryDirectory(prefix="obdlab-hot-", dir=work_dir) as directory:
        path = Path(directory) / "hot.obd"
        with (
            opened(source, manifest, settings, client, Path(directory), progress) as disk,
            path.open("xb") as file,
        ):
            _refuse_hot(disk, source)
            write_packed(
                file, packing, lambda sink: write_hot_layer(disk, trace, sink, name=trace_name), name="hot layer"
            )
        layer = _top_layer(path, "obdlab: hot layer", {oci.HOT_LAYER: "yes"})
        return add_layer(source, manifest, layer, destination, work_dir, progress), layer.size


def add_acceleration_layer(
    source: ImageSource,
    destination: ImageDestination,
    trace: bytes,
    settings: Settings,
    *,
    client: RegistryClient | None = None,
    platform: oci.Platform | None = None,
    work_dir: Path = Path("/var/tmp"),
    progress: Progress | None = None,
    trace_name: str = "trace",
) -> oci.Descriptor:
    """Store ``source`` with the trace (or priority list) as the original's acceleration layer at ``destination``."""
    manifest = manifest_of(source, platform)
    with tempfile.TemporaryDirectory(prefix="obdlab-trace-", dir=work_dir) as directory:
        with opened(source, manifest, settings, client, Path(directory), progress) as disk:
            reads_in(trace, disk, name=trace_name)
        path = Path(directory) / "trace.tar"
        path.write_bytes(layer_of_content(trace))
        layer = _top_layer(path, "Acceleration Layer", {oci.ACCELERATION_LAYER: "yes"})
        return add_layer(source, manifest, layer, destination, work_dir, progress)


def attach_trace(
    client: RegistryClient,
    reference: Reference,
    trace: bytes,
    settings: Settings,
    *,
    platform: oci.Platform | None,
    trace_name: str = "trace",
) -> str:
    """Store ``trace`` in the registry as an artifact that refers to the image; return the artifact's digest.

    If an image has several, the newest counts. Raises as :func:`add_acceleration_layer` does.
    """
    source = RegistrySource(reference, client)
    subject, manifest = source.find(platform or host_platform(), overlaybd=True)
    with (
        tempfile.TemporaryDirectory(prefix="obdlab-trace-", dir=_PLACE) as directory,
        opened(source, manifest, settings, client, Path(directory), None) as disk,
    ):
        _refuse_hot(disk, source)
        reads_in(trace, disk, name=trace_name)
    repository = client.repository(reference)
    descriptors = []
    for media_type, data in ((oci.EMPTY_TYPE, oci.EMPTY), (TRACE_ARTIFACT, trace)):
        descriptor = oci.Descriptor(media_type, oci.digest_of(data), len(data))
        client.push_blob(repository, descriptor.digest, len(data), lambda data=data: io.BytesIO(data))  # type: ignore[misc]
        descriptors.append(descriptor)
    artifact = oci.Manifest(
        config=descriptors[0],
        layers=(descriptors[1],),
        media_type=oci.OCI_MANIFEST,
        annotations={CREATED: datetime.now(UTC).isoformat(timespec="microseconds")},
        artifact_type=TRACE_ARTIFACT,
        subject=oci.Descriptor(subject.media_type, subject.digest, subject.size),
    )
    data = artifact.to_bytes()
    return client.put_manifest(reference.with_digest(oci.digest_of(data)), oci.OCI_MANIFEST, data)


def detach_traces(client: RegistryClient, reference: Reference, *, platform: oci.Platform | None) -> list[str]:
    """Remove all traces that :func:`attach_trace` added to an image; return the digests of the artifacts."""
    subject, _ = RegistrySource(reference, client).find(platform or host_platform(), overlaybd=True)
    repository = client.repository(reference)
    found = [each.digest for each in client.referrers(repository, subject.digest, TRACE_ARTIFACT)]
    for digest in found:
        client.remove_referrer(repository, subject.digest, digest)
    return found


@contextmanager
def opened(
    source: ImageSource,
    manifest: oci.Manifest,
    settings: Settings,
    client: RegistryClient | None,
    work_dir: Path,
    progress: Progress | None,
) -> Iterator[Stack]:
    """Open the disk of an overlaybd image: from a registry on demand, else after fetching its layers.

    The small blobs of turboOCI layers are unpacked below ``work_dir``. Raises FormatError if these have two file
    systems: each node may take another one, and traces and hot layers are of one alone.
    """
    place = work_dir / "blobs"
    _check_one_file_system(source, manifest, place)
    if client is None or not isinstance(source, RegistrySource):
        with ExitStack() as ended:
            yield Stack(fetched_layers(source, manifest, work_dir, progress or Silent(), ended))
        return
    repository = client.repository(Reference.parse(source.name))
    turbo = partial(unpacked, source, place)
    config = config_from_manifest(manifest, repository, name=source.name, unpacked=turbo)
    with open_image(config, settings, traces=False) as image:
        if isinstance(image, WritableStack):
            raise FormatError("image is writable", blob=source.name)
        yield image


def _check_one_file_system(source: ImageSource, manifest: oci.Manifest, place: Path) -> None:
    turbo = next((layer for layer in manifest.layers if layer.turbo_target is not None), None)
    found = file_systems_in(unpacked(source, place, turbo)) if turbo is not None else []
    if len(found) > 1:
        raise FormatError(
            "image has two file systems, and a trace or hot layer belongs to one",
            blob=source.name,
            got=" and ".join(found),
            wanted="an image converted with one --fs",
        )


def _refuse_hot(disk: Stack, source: ImageSource) -> None:
    if disk.layers and is_hot(disk.layers[-1]):
        raise FormatError("image has a hot layer already, beside which no trace is replayed", blob=source.name)


def _top_layer(path: Path, created_by: str, annotations: dict[str, str]) -> TopLayer:
    try:
        digest = digest_of_file(path)
        return TopLayer(path, digest, path.stat().st_size, created_by, annotations)
    except OSError as error:
        raise SourceError(f"cannot read the layer: {error.strerror}", blob=str(path)) from error
