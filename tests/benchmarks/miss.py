"""The time of a miss beside the same range through bare urllib3: python tests/benchmarks/miss.py

Misses of 16 KiB, and requests of urllib3 for other ranges of the blob, in turns, from docker-registry over loopback.
Prints the medians of both: elapsed time, and this thread's processor time, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import urllib3

sys.path.insert(0, str(Path(__file__).parents[2]))

from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.formats.oci import digest_of
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Repository
from obdlab.registry.remoteblob import RemoteBlob
from tests.registry.server import running_registry

UNIT = 16 << 10
BLOB_SIZE = 64 << 20


def timed(read: Callable[[int, int], bytes], offset: int) -> tuple[float, float]:
    """Return the elapsed and the processor seconds of one read of a unit."""
    began, busy = time.perf_counter(), time.thread_time()
    if len(read(offset, UNIT)) != UNIT:
        raise RuntimeError("short read")
    return time.perf_counter() - began, time.thread_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reads", type=int, default=400)
    reads = parser.parse_args().reads
    data = random.Random(1).randbytes(BLOB_SIZE)
    digest = digest_of(data)
    pools = urllib3.PoolManager()
    with (
        tempfile.TemporaryDirectory() as directory,
        running_registry(Path(directory)) as server,
        closing(RegistryClient()) as client,
    ):
        repository = Repository(server.host, "benchmark", plain_http=True)
        client.push_blob(repository, digest, len(data), lambda: io.BytesIO(data))
        cache = BlockCache(Path(directory) / "cache", unit=UNIT, extent=UNIT, readahead_max=0)
        url = f"{repository.blobs_url}/{digest}"

        def bare(offset: int, length: int) -> bytes:
            headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
            response = pools.request("GET", url, headers=headers, preload_content=False)
            content = response.read(length)
            response.release_conn()
            return content

        with cache.open(RemoteBlob(client, repository, digest, len(data)), digest) as blob:
            assert isinstance(blob, CachedBlob)
            blob.opened(60.0)
            offsets = random.Random(2).sample(range(0, BLOB_SIZE, 2 * UNIT), 2 * reads + 40)
            for offset in offsets[:20]:
                blob.read_at(offset, UNIT)
                bare(offset, UNIT)
            missed, plain = [], []
            for one, other in zip(offsets[40::2], offsets[41::2], strict=True):
                missed.append(timed(blob.read_at, one))
                plain.append(timed(bare, other))
    print(f"{reads} reads of {UNIT >> 10} KiB")
    for number, name in enumerate(("elapsed", "processor")):
        miss, request = (statistics.median(each[number] for each in times) for times in (missed, plain))
        print(
            f"{name:10} miss {miss * 1e6:7.0f} µs, bare urllib3 {request * 1e6:7.0f} µs, ratio {miss / request:.2f}"
        )


if __name__ == "__main__":
    main()
