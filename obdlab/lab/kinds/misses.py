"""The latency of a cache miss: single reads of an image in a distant registry, nothing cached."""

from __future__ import annotations

import random
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import convert_image
from obdlab.image.from_manifest import fetch_config
from obdlab.image.open import Image, open_image
from obdlab.lab.images.ocilayout import push_layout
from obdlab.lab.kinds.kind import Kind, Metric
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.registry import RegistryHost
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from obdlab.lab.kinds.kind import Place, Point, Value
    from obdlab.layers.stack import Stack

_SEED = 7
_NAME = "misses"


class Misses(Kind):
    """Reads of one segment lie in cache extents of their own; readahead is off."""

    name: ClassVar[str] = "misses"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {"rtt_ms": (0, 5, 20), "size": (4096, 131072)}
    options: ClassVar[Mapping[str, Value]] = {"image": "redis", "rate_mbit": 1000, "reads": 100}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("p50_ms", "ms"),
        Metric("p90_ms", "ms"),
        Metric("p99_ms", "ms"),
        Metric("own_ms", "ms beside the round trip"),
        Metric("hit_us", "µs for the same read again"),
    )
    programs: ClassVar[Mapping[str, str]] = {"docker-registry": "docker-registry"}

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Convert the image once. Each point starts a registry behind the point's link."""
        layout = place.images[str(options["image"])]
        converted = place.work / "converted"
        with closing(RegistryClient()) as client:
            convert_image(open_source(f"oci:{layout}", client), open_destination(f"oci:{converted}:new", client))
        yield lambda point: _measure(converted, options, point, place.work)


def _measure(converted: Path, options: Mapping[str, Value], point: Point, work: Path) -> dict[str, float]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
        rtt_ms = float(point["rtt_ms"])
        network = stack.enter_context(ExperimentNetwork(float(options["rate_mbit"]), rtt_ms, directory / "state"))
        host = stack.enter_context(RegistryHost(directory, network))
        client = stack.enter_context(closing(RegistryClient()))
        reference = Reference.parse(host.reference(_NAME, "new"))
        push_layout(converted, client, reference)
        settings = Settings(cache_dir=directory / "cache", readahead_max=0, cache_extent_max=0)
        config = fetch_config(client, reference, host_platform())
        with open_image(config, settings, traces=False) as image:
            assert isinstance(image, Image)
            size = int(point["size"])
            offsets = _offsets(image, int(options["reads"]), size, settings.cache_extent)
            missed = _timed(image, offsets, size)
            hit = _timed(image, offsets, size)
    p50, p90, p99 = (float(value) * 1e3 for value in np.percentile(missed, [50, 90, 99]))
    own = p50 - rtt_ms
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "own_ms": own, "hit_us": float(np.median(hit)) * 1e6}


# Offsets in one segment are four extents apart: compressed data of neighbouring extents may share one of the blob.
# Offsets in different segments can share an extent of the blob, where their data stand beside each other in a layer:
# the second read of it is a hit, and makes the percentiles a little shorter. (Four extents between all of them would
# leave fewer places than reads in a small image.)
def _offsets(image: Stack, count: int, size: int, extent: int) -> list[int]:
    segments = image.index.segments()
    rows = segments[~segments.zeroed]
    places = [
        at * 512
        for begin, end in zip(rows.offset_sectors.tolist(), rows.end_sectors.tolist(), strict=True)
        for at in range(begin, end - size // 512, 4 * extent // 512)
    ]
    if len(places) < count:
        raise LabError(f"misses: the image has room for {len(places)} reads of their own (wanted {count})")
    return random.Random(_SEED).sample(places, count)


def _timed(image: Stack, offsets: Sequence[int], size: int) -> list[float]:
    times = []
    for offset in offsets:
        began_s = time.perf_counter()
        image.read_at(offset, size)
        times.append(time.perf_counter() - began_s)
    return times
