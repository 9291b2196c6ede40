"""What a stack adds to the read of a layer: microseconds per call, read-only and with a writable layer on top.

Run: python -m tests.benchmarks.stack [segments]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from obdlab.blob import Blob
from obdlab.call import Call
from obdlab.formats.lsmt.index import SegmentIndex
from obdlab.formats.lsmt.layout import NULL_UUID
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import SparseUpper
from tests.benchmarks.merge import random_layer

_READS = 20_000


class NoCost(Blob):
    """Answers any read at once, so that only what is above it is measured."""

    name = "no cost"
    size = 1 << 50

    def __init__(self) -> None:
        self._answers = {length: bytes(length) for length in (4096, 131072)}

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        return self._answers.get(length) or bytes(length)


class SampleLayer:
    """A layer with a random index over no data."""

    def __init__(self, seed: int, segments: int) -> None:
        self.name = f"sample {seed}"
        columns = random_layer(np.random.default_rng(seed), segments, 128 * segments)
        self.index = SegmentIndex(columns)
        self.virtual_size = 128 * segments * 512
        self.data: Blob = NoCost()
        self.parent_uuid = NULL_UUID

    def close(self) -> None:
        """Nothing to release."""


def microseconds_a_read(blob: Blob, offsets: list[int], length: int) -> float:
    """The best of three passes over the offsets."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for offset in offsets:
            blob.read_at(offset, length)
        times.append(time.perf_counter() - begin)
    return min(times) / len(offsets) * 1e6


def main() -> None:
    segments = int(sys.argv[1]) if len(sys.argv) > 1 else 25_000
    stack = Stack([SampleLayer(seed, segments) for seed in (1, 2)])
    rng = random.Random(3)
    with tempfile.TemporaryDirectory() as folder:
        upper = SparseUpper.create(Path(folder) / "upper", stack.size // 512 * 512)
        for _ in range(1000):
            upper.write_at(rng.randrange(stack.size // 4096) * 4096, bytes(4096))
        with WritableStack(stack, upper) as writable:
            for length in (4096, 131072):
                offsets = [rng.randrange((stack.size - length) // 4096) * 4096 for _ in range(_READS)]
                bare = microseconds_a_read(NoCost(), offsets, length)
                for what, blob in (("stack", stack), ("writable stack", writable)):
                    taken = microseconds_a_read(blob, offsets, length) - bare
                    print(f"{what} of {len(stack.index)} segments, {length // 1024} KiB: {taken:.2f} us a read")


if __name__ == "__main__":
    main()
