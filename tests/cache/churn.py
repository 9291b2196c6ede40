"""Readers of many blobs in a small cache, as processes of their own: python -m tests.cache.churn DIRECTORY ..."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from obdlab.blob import Blob, MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.formats.oci import digest_of

UNIT = 4096
BLOBS = 12
SIZE = 60 * UNIT + 77


def content(number: int) -> bytes:
    return random.Random(1000 + number).randbytes(SIZE)


def start(directory: Path, seed: int, *, quota: int, seconds: float) -> subprocess.Popen[str]:
    arguments = [str(directory), f"--seed={seed}", f"--quota={quota}", f"--seconds={seconds}"]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cache.churn", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def churn(directory: Path, *, seed: int, quota: int, seconds: float) -> str:
    """Read at random for a while; return what it took. Wrong bytes are an AssertionError."""
    chooser = random.Random(seed)
    contents = [content(number) for number in range(BLOBS)]
    cache = BlockCache(directory, quota=quota, unit=UNIT, readahead_max=8 * UNIT)
    end = time.monotonic() + seconds
    reads = 0
    print("ready", flush=True)
    while time.monotonic() < end:
        with ExitStack() as opened:
            blobs = {}
            for number in chooser.sample(range(BLOBS), 4):
                origin = MemoryBlob(contents[number], f"blob {number}")
                blobs[number] = opened.enter_context(cache.open(origin, digest_of(contents[number])))
            with ThreadPoolExecutor(2) as threads:
                for done in [threads.submit(read, blobs, contents, chooser.random()) for _ in range(2)]:
                    reads += done.result()
    return f"{reads} reads: {cache.statistics()}"


def read(blobs: dict[int, Blob], contents: list[bytes], seed: float) -> int:
    chooser = random.Random(seed)
    for _ in range(150):
        number = chooser.choice(list(blobs))
        offset = chooser.randrange(SIZE)
        length = min(chooser.choice([1, 3000, 4 * UNIT, 20 * UNIT]), SIZE - offset)
        assert blobs[number].read_at(offset, length) == contents[number][offset : offset + length], (
            f"wrong bytes of blob {number} at {offset}, {length}"
        )
        if chooser.random() < 0.01:
            blobs[number].evict(offset, length)
    return 150


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--quota", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    print(churn(**vars(parser.parse_args())))
