"""Which HTTP library reads ranges fastest, and what our client adds: python tests/benchmarks/registry.py

Each candidate reads the same ranges from docker-registry over loopback, in turns, one request at a time. Times are
this thread's CPU time, which is what a library costs; ratios are against http.client, the bare standard library.
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import urllib3

sys.path.insert(0, str(Path(__file__).parents[2]))

from obdlab.formats.oci import digest_of
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Repository
from tests.registry.server import RegistryServer, running_registry

BLOB_SIZE = 64 << 20
Reader = Callable[[int, int], bytes]


def candidates(server: RegistryServer, repository: Repository, digest: str) -> dict[str, Reader]:
    """Return one reader per library, each with a kept connection."""
    url = f"{repository.blobs_url}/{digest}"
    path = url.removeprefix(server.url)
    connection = http.client.HTTPConnection(server.host)
    pools = urllib3.PoolManager()
    client = RegistryClient()

    def with_http_client(offset: int, length: int) -> bytes:
        connection.request("GET", path, headers={"Range": f"bytes={offset}-{offset + length - 1}"})
        return connection.getresponse().read()

    def with_urllib3(offset: int, length: int) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        response = pools.request("GET", url, headers=headers, preload_content=False)
        data = response.read(length)
        response.release_conn()
        return data

    readers: dict[str, Reader] = {
        "http.client": with_http_client,
        "urllib3": with_urllib3,
        "RegistryClient": lambda offset, length: client.read_range(repository, digest, offset, length),
    }
    try:
        import httpx
    except ImportError:
        return readers
    session = httpx.Client()

    def with_httpx(offset: int, length: int) -> bytes:
        return session.get(url, headers={"Range": f"bytes={offset}-{offset + length - 1}"}).content

    return {**readers, "httpx": with_httpx}


def seconds(read: Reader, length: int, count: int) -> float:
    """Return the CPU time ``count`` reads of ``length`` bytes take."""
    started = time.thread_time()
    for number in range(count):
        offset = number * length % (BLOB_SIZE - length)
        if len(read(offset, length)) != length:
            raise RuntimeError("short read")
    return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    data = os.urandom(BLOB_SIZE)
    digest = digest_of(data)
    with tempfile.TemporaryDirectory() as directory, running_registry(Path(directory)) as server:
        repository = Repository(server.host, "benchmark", plain_http=True)
        RegistryClient().push_blob(repository, digest, len(data), lambda: io.BytesIO(data))
        readers = candidates(server, repository, digest)
        for length, count in ((64 << 10, 100), (1 << 20, 20)):
            times: dict[str, list[float]] = {name: [] for name in readers}
            for _ in range(rounds):
                for name, read in readers.items():
                    times[name].append(seconds(read, length, count) / count)
            base = statistics.median(times["http.client"])
            for name, samples in times.items():
                median = statistics.median(samples)
                print(
                    f"{length >> 10:5} KiB  {name:15} {median * 1e6:8.0f} µs CPU  {median / base:5.2f} of http.client"
                )


if __name__ == "__main__":
    main()
