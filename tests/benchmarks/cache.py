"""What a hit in the block cache costs beside the bare pread below it: python tests/benchmarks/cache.py"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable

from obdlab.blob import MemoryBlob
from obdlab.formats.oci import digest_of
from obdlab.sources.cache import BlockCache
from obdlab.sources.cachedblob import CachedBlob

SIZE = 32 << 20


def microseconds(read: Callable[[int, int], bytes], offsets: list[int], length: int) -> float:
    """Return the time of one read, in the mean."""
    started = time.perf_counter()
    for offset in offsets:
        read(offset, length)
    return (time.perf_counter() - started) / len(offsets) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    data = os.urandom(SIZE)
    with tempfile.TemporaryDirectory() as directory:
        blob = BlockCache(directory).open(MemoryBlob(data), digest_of(data))
        assert isinstance(blob, CachedBlob)
        blob.read_at(0, SIZE)
        fd = os.open(f"{directory}/blobs/local/{digest_of(data)}/data", os.O_RDONLY)
        for length in (4 << 10, 128 << 10):
            offsets = [random.randrange(0, SIZE - length) for _ in range(2000)]
            cached, bare = [], []
            for _ in range(rounds):
                cached.append(microseconds(blob.read_at, offsets, length))
                bare.append(microseconds(lambda offset, length: os.pread(fd, length, offset), offsets, length))
            hit, floor = statistics.median(cached), statistics.median(bare)
            print(f"{length >> 10:4} KiB  hit {hit:6.2f} µs, pread {floor:6.2f} µs: adds {hit - floor:5.2f} µs")
        os.close(fd)
        blob.close()


if __name__ == "__main__":
    main()
