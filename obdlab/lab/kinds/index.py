"""Merged indexes: lookups per second on one core, time to merge layers, size of the index.

(The paper's figure 7, and its text on the merge of layers' indexes.)
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from obdlab.formats.lsmt.index import SegmentIndex, merge
from obdlab.formats.lsmt.layout import RECORD_SIZE, Segments
from obdlab.lab.kinds.kind import Kind, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from obdlab.lab.kinds.kind import Place, Point, Value

_LOOKUPS = 20_000
_BATCH = 200_000
#: Disk sectors for each segment: a third of the disk is written.
_SPREAD = 96
_READ_SECTORS = 8
_SEED = 7


class Index(Kind):
    """Stacked random layers with segments of 1 to 64 sectors; the merged index has about ``segments`` segments."""

    name: ClassVar[str] = "index"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "segments": (1000, 4500, 10_000, 100_000),
        "layers": (1, 10, 50),
    }
    options: ClassVar[Mapping[str, Value]] = {}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("lookup_us", "µs"),
        Metric("batch_m_s", "M/s", higher=True),
        Metric("merge_ms", "ms"),
        Metric("index_kib", "KiB"),
        Metric("merged_segments", ""),
    )
    programs: ClassVar[Mapping[str, str]] = {}

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Prepare nothing: each point makes its own indexes."""
        yield lambda point: _measure(int(point["segments"]), int(point["layers"]))


def _measure(segments: int, layers: int) -> dict[str, float]:
    rng = np.random.default_rng(_SEED)
    disk = _SPREAD * segments
    indexes = [SegmentIndex(_random_layer(rng, max(1, segments // layers), disk)) for _ in range(layers)]
    began_s = time.perf_counter()
    merged = merge(indexes)
    merge_s = time.perf_counter() - began_s
    begin = rng.integers(0, disk - _READ_SECTORS, _BATCH)
    singles = begin[:_LOOKUPS].tolist()
    began_s = time.perf_counter()
    for sector in singles:
        merged.lookup(sector, sector + _READ_SECTORS)
    lookup_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    merged.lookup_batch(begin, begin + _READ_SECTORS)
    batch_s = time.perf_counter() - began_s
    return {
        "lookup_us": lookup_s / _LOOKUPS * 1e6,
        "batch_m_s": _BATCH / batch_s / 1e6,
        "merge_ms": merge_s * 1e3,
        "index_kib": len(merged) * RECORD_SIZE / 1024,
        "merged_segments": float(len(merged)),
    }


def _random_layer(rng: np.random.Generator, segments: int, disk_sectors: int) -> Segments:
    length = rng.integers(1, 65, segments)
    room = disk_sectors - int(length.sum())
    offset = np.sort(rng.integers(0, room, segments)) + np.cumsum(length) - length
    return Segments(
        offset_sectors=offset,
        length_sectors=length,
        moffset_sectors=8 + np.cumsum(length) - length,
        zeroed=np.zeros(segments, bool),
        tag=np.zeros(segments, np.uint8),
    )
