"""What the block cache costs: a hit beside the bare pread below it, a miss beside the origin's answer.

python -m tests.benchmarks.cache
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable

from obdlab.blob import MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.unitfiles import CacheFiles
from obdlab.formats.oci import digest_of

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
            for name, pick in (("median", statistics.median), ("least", min)):
                hit, floor = pick(cached), pick(bare)
                adds = hit - floor
                print(f"{length >> 10:4} KiB  hit {hit:6.2f} µs, pread {floor:6.2f} µs: adds {adds:5.2f} µs ({name})")
        os.close(fd)
        blob.close()
    misses(data, rounds)


def misses(data: bytes, rounds: int) -> None:
    """Print what a miss of one unit takes, and how much of that is telling other processes of it."""
    unit = 64 << 10
    offsets = list(range(0, SIZE // 4, unit))
    times, claims = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            blob = BlockCache(directory, readahead_max=0).open(MemoryBlob(data), digest_of(data))
            assert isinstance(blob, CachedBlob)
            times.append(microseconds(blob.read_at, offsets, 4096))
            files = blob._files

            def claim(offset: int, length: int, files: CacheFiles = files) -> bytes:
                first = offset // unit
                files.claim(first, first + 1)
                files.present(first, first + 1)
                files.unclaim(first, first + 1)
                return b""

            claims.append(microseconds(claim, offsets, unit))
            blob.close()
    miss, told = statistics.median(times), statistics.median(claims)
    print(f"  64 KiB  miss {miss:6.1f} µs with storing, of which {told:5.1f} µs are for other processes")


if __name__ == "__main__":
    main()
