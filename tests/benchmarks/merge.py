"""Merge of a stack's indexes: milliseconds, and the ratio to a plain Python merge of the same layers.

Run: python -m tests.benchmarks.merge [layers] [segments per layer]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from obdlab.formats.lsmt.index import SegmentIndex, merge
from obdlab.formats.lsmt.layout import Segments
from tests.formats.lsmt.oracle import merge_rows


def random_layer(rng: np.random.Generator, segments: int, disk_sectors: int) -> Segments:
    """A layer of ``segments`` segments of 1 to 64 sectors at random places; one in eight is zeroed."""
    length = rng.integers(1, 65, segments)
    room = disk_sectors - int(length.sum())
    offset = np.sort(rng.integers(0, room, segments)) + np.cumsum(length) - length
    zeroed = rng.random(segments) < 0.125
    mapped = np.where(zeroed, 0, length)
    return Segments(
        offset_sectors=offset,
        length_sectors=length,
        moffset_sectors=8 + np.cumsum(mapped) - mapped,
        zeroed=zeroed,
        tag=np.zeros(segments, np.uint8),
    )


def best_ms(call: Callable[[], object], repeats: int) -> float:
    """The fastest of ``repeats`` calls in milliseconds: others share this machine."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times) * 1000


def main() -> None:
    layers, segments = (int(argument) for argument in (sys.argv[1:] + ["10", "100000"][len(sys.argv) - 1 :]))
    rng = np.random.default_rng(1)
    columns = [random_layer(rng, segments, 128 * segments) for _ in range(layers)]
    indexes = [SegmentIndex(layer) for layer in columns]
    rows = [layer.rows() for layer in columns]
    vectorised = best_ms(lambda: merge(indexes), 5)
    plain = best_ms(lambda: merge_rows(rows), 1)
    if merge(indexes).segments().rows() != merge_rows(rows):
        raise SystemExit("the two merges differ")
    print(f"merge of {layers} layers x {segments} segments: {vectorised:.0f} ms ({len(merge(indexes))} segments)")
    print(f"plain Python: {plain:.0f} ms, ratio {plain / vectorised:.1f}")


if __name__ == "__main__":
    main()
