"""Reordering the data of an overlaybd image's layers by a trace: the same disk, read in few requests."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.blob import find
from obdlab.convert.compare.imagetree import fetched_layers
from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.convert.progress import Silent
from obdlab.convert.publish.extend import manifest_of
from obdlab.convert.storedtrees import hold_trees, trees_like, with_trees
from obdlab.formats import oci
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.formats.trace import Trace
from obdlab.formats.zfile import Algorithm
from obdlab.image.from_manifest import check_native
from obdlab.layerfiles.writing import Packing, write_packed
from obdlab.layers.commit import commit
from obdlab.layers.front import has_front
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.layers.ordering import sectors_in_file
from obdlab.layers.stack import Stack
from obdlab.layers.zfile import ZFileReader
from obdlab.localfile import LocalFile
from obdlab.traces.replay import reads_in, reads_of_disk
from obdlab.traces.sectors import sectors_of_reads
from obdlab.traces.sets import unique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.convert.endpoints.endpoint import ImageDestination, ImageSource
    from obdlab.convert.progress import Progress
    from obdlab.layers.ordering import SectorRange
    from obdlab.layers.sink import Sink


def order_layers(
    source: ImageSource,
    destination: ImageDestination,
    trace: bytes,
    *,
    platform: oci.Platform | None = None,
    work_dir: Path = Path("/var/tmp"),
    progress: Progress | None = None,
    trace_name: str = "trace",
) -> tuple[oci.Descriptor, bytes]:
    """Store ``source`` with the reads of the trace (or priority list) first in each layer; return the new trace, too.

    Every layer is written again with its compression; layers that the trace does not touch keep their bytes. Offsets
    in a trace are those of the layers' files, so the old trace does not fit the new image. Raises FormatError and
    CorruptBlobError for trace or image; errors of reading and storing pass through.
    """
    manifest = manifest_of(source, platform)
    told = progress or Silent()
    with tempfile.TemporaryDirectory(prefix="obdlab-order-", dir=work_dir) as directory, ExitStack() as ended:
        work = Path(directory)
        for stored in manifest.layers:
            check_native(stored, source.name)
        layers = fetched_layers(source, manifest, work, told, ended)
        old = Stack(layers)
        reads = reads_in(trace, old, name=trace_name)
        described, files = [], []
        for number, (layer, descriptor) in enumerate(zip(layers, manifest.layers, strict=True)):
            own = sectors_of_reads([read for read in reads if read[0] == number], old)
            path = work / f"{number:03d}.obd"
            with told.task(f"layer {number}: order", descriptor.size) as task:
                _write(layer, own, path)
                task.advance(descriptor.size)
            files.append(path)
            described.append(_described(descriptor, path))
            destination.put_file(described[-1], path, lambda _: None)
        stored = _store(source, manifest, described, destination)
        new = Stack([ended.enter_context(open_layer(LocalFile(path))) for path in files])
        return stored, _new_trace(sectors_of_reads(reads, old), new)


def _write(layer: LsmtLayer, first: Sequence[SectorRange], path: Path) -> None:
    def write(sink: Sink) -> None:
        tag, order = layer.user_tag, first
        if has_front(layer):
            tag = "" if first else tag  # the front moves behind the trace's reads
            order = [*first, *sectors_in_file(layer.index.segments())]
        commit(layer, sink, uuid=layer.uuid, parent_uuid=layer.parent_uuid, user_tag=tag, first=order)

    with path.open("xb") as file:
        write_packed(file, _packing_of(layer), write, name=layer.name)


def _packing_of(layer: LsmtLayer) -> Packing:
    zfile = find(layer.data, ZFileReader)
    if zfile is None:
        return Packing("")
    return Packing(Algorithm(zfile.header.algorithm).label, zfile.header.block_size, tar=True)


def _described(old: oci.Descriptor, path: Path) -> oci.Descriptor:
    digest = digest_of_file(path)
    size = path.stat().st_size
    annotations = {**old.annotations, oci.BLOB_DIGEST: digest, oci.BLOB_SIZE: str(size)}
    if digest != old.digest:
        annotations.pop(oci.HASH_TREE, None)  # the old layer's
    return replace(old, digest=digest, size=size, annotations=annotations)


def _store(
    source: ImageSource, manifest: oci.Manifest, layers: Sequence[oci.Descriptor], destination: ImageDestination
) -> oci.Descriptor:
    config = source.config(manifest).with_diff_ids([layer.digest for layer in layers]).to_bytes()
    config_descriptor = replace(manifest.config, digest=oci.digest_of(config), size=len(config))
    destination.put_bytes(config_descriptor, config)
    treed = with_trees(layers, trees_like(destination, manifest))
    made = replace(manifest, config=config_descriptor, layers=treed, subject=None, artifact_type="")
    data = made.to_bytes()
    stored = oci.Descriptor(made.media_type, oci.digest_of(data), len(data))
    destination.put_manifest(stored, data)
    hold_trees(destination, stored, made)
    return stored


def _new_trace(sectors: Sequence[SectorRange], disk: Stack) -> bytes:
    reads = (read for begin, end in sectors for read in reads_of_disk(disk, begin * SECTOR, (end - begin) * SECTOR))
    return unique(Trace.from_reads(reads)).to_bytes()
