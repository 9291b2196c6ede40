"""Converting an image of Debian packages, from one OCI layout into another: time, size, segments."""

from __future__ import annotations

import resource
import shutil
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, ClassVar

from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.convert.layer import LayerOptions
from obdlab.lab.kinds.kind import Kind, Metric
from obdlab.layers.lsmt import open_layer
from obdlab.layers.stack import Stack
from obdlab.localfile import LocalFile
from obdlab.registry.client import RegistryClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from obdlab.lab.kinds.kind import Place, Point, Value


class Conversion(Kind):
    """The image's layers are gzip tars; the converted layers are in the original's format."""

    name: ClassVar[str] = "conversion"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "algorithm": ("lz4", "zstd"),
        "image": ("redis",),
        "block_size": (4096,),
    }
    options: ClassVar[Mapping[str, Value]] = {}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("seconds", "s"),
        Metric("of_source", "of the source's size"),
        Metric("size_mb", "MB"),
        Metric("segments", "in the merged index"),
        Metric("cpu_s", "s"),
    )
    programs: ClassVar[Mapping[str, str]] = {}

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Prepare nothing: ``place`` has the built images."""
        yield lambda point: _measure(point, place)


def _measure(point: Point, place: Place) -> dict[str, float]:
    layout = place.images[str(point["image"])]
    target = place.work / "converted"
    options = ConvertOptions(LayerOptions(str(point["algorithm"]), int(point["block_size"])), work_dir=place.work)
    before_s, began_s = _processor_s(), time.perf_counter()
    with (
        closing(RegistryClient()) as client,
        closing(open_source(f"oci:{layout}", client)) as source,
        closing(open_destination(f"oci:{target}:new", client)) as destination,
    ):
        made = convert_image(source, destination, options=options)
    seconds = time.perf_counter() - began_s
    cpu_s = _processor_s() - before_s
    source_size = sum(layer.source_size for layer in made.layers)
    segments = merged_segments(target, [layer.built.digest for layer in made.layers])
    shutil.rmtree(target)
    return {
        "seconds": seconds,
        "of_source": made.size / source_size,
        "size_mb": made.size / 1e6,
        "segments": float(segments),
        "cpu_s": cpu_s,
    }


def merged_segments(layout: Path, digests: list[str]) -> int:
    """Return the number of segments in the merged index of a layout's layers. Raises FormatError."""
    layers = [open_layer(LocalFile(ImageLayout(layout).blob_path(digest))) for digest in digests]
    with Stack(layers) as disk:
        return len(disk.index)


def _processor_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
