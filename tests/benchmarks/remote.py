"""Reading blobs over a shaped link, against a bare pooled client that does the same GETs in the same run. Needs root.

Run as ``python -m tests.benchmarks.remote``. The registry is docker-registry in a namespace behind 1 Gbit/s and 5 ms.
Each figure is of the same bytes read by ours and by urllib3 with as many threads, in turns, the median of several
rounds: a cold sequential read through the block cache (what a container does), and cold random reads of 4 KiB.
Large ranges are one request each: split over 2 or 4 connections they took 1.3 and 1.8 times as long here, since one
connection with a warm window fills the link, and more of them cost processor time.
"""

from __future__ import annotations

import argparse
import io
import queue
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import urllib3

from obdlab.cache.blockcache import BlockCache
from obdlab.formats.oci import digest_of
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.registry import RegistryHost
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Repository
from obdlab.registry.remoteblob import RemoteBlob

MIB = 1 << 20
PIECE = 256 << 10
Ranges = Sequence[tuple[int, int]]
# randbytes() makes a number first, which has fewer than 2**31 bits.
_PART = 64 << 20


def bare(url: str, ranges: Ranges, threads: int) -> float:
    """Seconds that a pooled urllib3 takes for the ranges, with as many threads, each with its kept connection."""
    pools = urllib3.PoolManager(maxsize=threads)
    waiting: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for each in ranges:
        waiting.put(each)

    def work(_: int) -> None:
        while True:
            try:
                offset, length = waiting.get_nowait()
            except queue.Empty:
                return
            headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
            response = pools.request("GET", url, headers=headers, preload_content=False)
            if len(response.read(length)) != length:
                raise RuntimeError("short read")
            response.release_conn()

    with ThreadPoolExecutor(threads) as executor:
        started = time.perf_counter()
        list(executor.map(work, range(threads)))
        taken = time.perf_counter() - started
    pools.clear()
    return taken


def threaded(read: Callable[[int, int], bytes], ranges: Ranges, threads: int) -> float:
    """Seconds that ``threads`` readers take for the ranges."""
    with ThreadPoolExecutor(threads) as executor:
        started = time.perf_counter()
        for data, (_, length) in zip(executor.map(lambda each: read(*each), ranges), ranges, strict=True):
            if len(data) != length:
                raise RuntimeError("short read")
        return time.perf_counter() - started


def sequential_bare(url: str, size: int) -> float:
    return bare(url, [(begin, min(PIECE, size - begin)) for begin in range(0, size, PIECE)], 8)


def sequential_ours(client: RegistryClient, repository: Repository, digest: str, size: int) -> float:
    """Read all of it from start to end through a fresh block cache, as one reader of a device does."""
    with (
        tempfile.TemporaryDirectory(dir=".") as directory,
        BlockCache(directory).open(RemoteBlob(client, repository, digest, size), digest) as blob,
    ):
        started = time.perf_counter()
        for begin in range(0, size, 128 << 10):
            blob.read_at(begin, min(128 << 10, size - begin))
        return time.perf_counter() - started


def large_ours(client: RegistryClient, repository: Repository, digest: str, ranges: Ranges) -> float:
    blob = RemoteBlob(client, repository, digest, max(offset + length for offset, length in ranges))
    started = time.perf_counter()
    for offset, length in ranges:
        blob.read_at(offset, length)
    return time.perf_counter() - started


def compare(what: str, ours: Callable[[], float], theirs: Callable[[], float], rounds: int, amount: float) -> None:
    """Print medians of alternating rounds; ``amount`` is in MiB, or requests."""
    both = [(ours(), theirs()) if number % 2 else (theirs(), ours())[::-1] for number in range(rounds)]
    mine, bare_s = statistics.median(m for m, _ in both), statistics.median(b for _, b in both)
    ratio = statistics.median(b / m for m, b in both)
    print(f"{what:44} {amount / mine:8.1f}/s ours {amount / bare_s:8.1f}/s bare   ratio {ratio:5.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=500, metavar="MB", help="of the layer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reads", type=int, default=3000, help="random reads in a round (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1000.0, metavar="MBIT")
    parser.add_argument("--rtt", type=float, default=5.0, metavar="MS")
    args = parser.parse_args()
    size = args.size * 1_000_000
    source = random.Random(1)
    data = b"".join(source.randbytes(min(_PART, size - at)) for at in range(0, size, _PART))
    digest = digest_of(data)
    with (
        tempfile.TemporaryDirectory(dir=".") as directory,
        ExperimentNetwork(args.rate, args.rtt, Path(directory)) as network,
        RegistryHost(Path(directory) / "registry", network) as host,
        closing(RegistryClient()) as client,
    ):
        repository = Repository(host.host, "benchmark", plain_http=True)
        with network.unshaped():
            client.push_blob(repository, digest, size, lambda: io.BytesIO(data))
        host.preload()
        url = f"{repository.blobs_url}/{digest}"
        compare(
            f"sequential, {args.size} MB through the cache (MB)",
            lambda: sequential_ours(client, repository, digest, size),
            lambda: sequential_bare(url, size),
            args.rounds,
            args.size,
        )
        for depth in (1, 16):
            count = args.reads if depth > 1 else args.reads // 10
            chooser = random.Random(depth)
            ranges = [(chooser.randrange(size // 4096) * 4096, 4096) for _ in range(count)]
            compare(
                f"random 4 KiB, {depth} at once (requests)",
                lambda ranges=ranges, depth=depth: threaded(  # type: ignore[misc]
                    lambda offset, length: client.read_range(repository, digest, offset, length), ranges, depth
                ),
                lambda ranges=ranges, depth=depth: bare(url, ranges, depth),  # type: ignore[misc]
                args.rounds,
                count,
            )
        large = [(begin, 4 * MIB) for begin in range(0, min(size, 96 * MIB) - 4 * MIB, 4 * MIB)]
        compare(
            "ranges of 4 MiB, one at once (MiB)",
            lambda: large_ours(client, repository, digest, large),
            lambda: bare(url, large, 1),
            args.rounds,
            4 * len(large),
        )


if __name__ == "__main__":
    main()
