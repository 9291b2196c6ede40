"""The cost of hash trees: reads through the block cache with and without a check of each unit, in turns.

python -m tests.benchmarks.verified

The origin is memory, so that all of the difference is processor time. "cold": nothing is cached; "reopened": all is
cached, and this process has read nothing of it (a dropped start); "warm": it has read everything before.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

from obdlab.blob import Blob, MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.formats.hashtree import HashTree, TreeMaker
from obdlab.formats.oci import digest_of
from obdlab.image.checkedblob import CheckedBlob
from obdlab.image.treenodes import KeptNodes, TreeNodes

Ranges = list[tuple[int, int]]


class Layer:
    """A layer of random bytes, and its tree."""

    def __init__(self, size: int) -> None:
        self.data = random.Random(1).randbytes(size)
        self.digest = digest_of(self.data)
        maker = TreeMaker()
        began = time.perf_counter()
        maker.update(self.data)
        self.tree: HashTree = maker.finish(self.digest)
        self.made_s = time.perf_counter() - began

    def open(self, directory: Path, *, checked: bool) -> Blob:
        """Return the layer through the block cache."""
        cache = BlockCache(directory, readahead_max=0)
        origin: Blob = MemoryBlob(self.data, "layer")
        if not checked:
            return cache.open(origin, self.digest)
        reference = self.tree.reference
        file = cache.open(MemoryBlob(self.tree.file, "tree"), reference.file)
        nodes = TreeNodes("layer", self.digest, len(self.data), reference, file, KeptNodes())
        return cache.open(CheckedBlob(origin, nodes), self.digest, nodes)


def seconds(blob: Blob, ranges: Ranges) -> float:
    """Return the time of reading the ranges."""
    began = time.perf_counter()
    for offset, length in ranges:
        blob.read_at(offset, length)
    return time.perf_counter() - began


def once(layer: Layer, ranges: Ranges, *, checked: bool) -> dict[str, float]:
    """Return the seconds of reading the ranges cold, reopened and warm."""
    with tempfile.TemporaryDirectory() as name:
        with closing(layer.open(Path(name), checked=checked)) as blob:
            cold = seconds(blob, ranges)
        with closing(layer.open(Path(name), checked=checked)) as blob:
            return {"cold": cold, "reopened": seconds(blob, ranges), "warm": seconds(blob, ranges)}


def compare(what: str, layer: Layer, ranges: Ranges, rounds: int) -> None:
    """Print for each state the median times, and the median of the ratios of rounds."""
    pairs = []
    for number in range(rounds):
        turns: list[bool] = [True, False] if number % 2 else [False, True]
        both = {checked: once(layer, ranges, checked=checked) for checked in turns}
        pairs.append((both[False], both[True]))
    amount = sum(length for _, length in ranges) / (1 << 20)
    for state in ("cold", "reopened", "warm"):
        plain, checked = (statistics.median(pair[side][state] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(pair[1][state] / pair[0][state] for pair in pairs)
        extra = (checked - plain) / amount * 1e3
        print(
            f"{what:22} {state:9} {plain:7.3f} s, checked {checked:7.3f} s: ratio {ratio:5.2f}, {extra:+6.2f} ms/MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64, metavar="MIB", help="of the layer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    layer = Layer(args.size << 20)
    share = len(layer.tree.file) / len(layer.data)
    print(f"tree of {args.size} MiB: {len(layer.tree.file)} bytes, {share:.3%}; made in {layer.made_s:.2f} s")
    step = 128 << 10
    compare("128 KiB, in order", layer, [(at, step) for at in range(0, len(layer.data), step)], args.rounds)
    choose = random.Random(2)
    places = [(choose.randrange(0, len(layer.data) - 4096), 4096) for _ in range(2000)]
    compare("4 KiB, 2000 at random", layer, places, args.rounds)


if __name__ == "__main__":
    main()
