"""HTTP libraries beside each other: python -m tests.benchmarks.http_libraries [--python OTHER/bin/python ...]

Each reads ranges of 64 KiB from docker-registry over loopback, one and sixteen at a time, in a process of its own, in
turns; also told: what importing it takes, and the process's memory at the end. Those that are not installed in this
Python, or in one named with --python (a venv with httpx, pycurl, niquests), are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

LENGTH = 64 << 10
BLOB_SIZE = 64 << 20
LIBRARIES = ("http.client", "urllib3", "httpx", "niquests", "pycurl")
Reader = Callable[[int], bytes]


def reader(library: str, url: str) -> Callable[[], Reader]:
    """Return what makes a thread its reader: with a connection of its own, or all with one pool."""
    if library == "http.client":
        import http.client

        parts = urlsplit(url)

        def with_http_client() -> Reader:
            connection = http.client.HTTPConnection(parts.netloc)

            def read(offset: int) -> bytes:
                connection.request("GET", parts.path, headers=_range(offset))
                return connection.getresponse().read()

            return read

        return with_http_client
    if library == "urllib3":
        import urllib3

        pools = urllib3.PoolManager(maxsize=16)
        return lambda: lambda offset: pools.request("GET", url, headers=_range(offset)).data
    if library == "httpx":
        import httpx

        client = httpx.Client(limits=httpx.Limits(max_connections=16, max_keepalive_connections=16))
        return lambda: lambda offset: client.get(url, headers=_range(offset)).content
    if library == "niquests":
        import niquests

        session = niquests.Session(pool_maxsize=16)
        return lambda: lambda offset: session.get(url, headers=_range(offset)).content or b""
    import pycurl

    def with_pycurl() -> Reader:
        curl = pycurl.Curl()
        curl.setopt(pycurl.URL, url)

        def read(offset: int) -> bytes:
            pieces: list[bytes] = []
            curl.setopt(pycurl.RANGE, f"{offset}-{offset + LENGTH - 1}")
            curl.setopt(pycurl.WRITEFUNCTION, pieces.append)
            curl.perform()
            return b"".join(pieces)

        return read

    return with_pycurl


def _range(offset: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-{offset + LENGTH - 1}"}


def rate(make: Callable[[], Reader], depth: int, seconds: float) -> float:
    """Return ranges read in a second by ``depth`` threads together."""
    counts = [0] * depth
    end = time.monotonic() + seconds

    def run(number: int) -> None:
        read = make()
        while time.monotonic() < end:
            offset = (number * 7919 + counts[number]) * LENGTH % BLOB_SIZE
            if len(read(offset)) != LENGTH:
                raise RuntimeError("short read")
            counts[number] += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(depth)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - started)


def measure(library: str, url: str, seconds: float) -> dict[str, float]:
    """Measure one library in this process."""
    started = time.perf_counter()
    make = reader(library, url)
    import_ms = (time.perf_counter() - started) * 1e3
    make()(0)
    result = {"import_ms": import_ms, "qd1": rate(make, 1, seconds), "qd16": rate(make, 16, seconds)}
    with open("/proc/self/status") as status:
        resident = next(line for line in status if line.startswith("VmRSS"))
    return {**result, "rss_mib": int(resident.split()[1]) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--python", action="append", default=[], help="another interpreter to find libraries in")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "URL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.seconds)))
        return
    _compare([sys.executable, *args.python], args.rounds, args.seconds)


def _compare(pythons: list[str], rounds: int, seconds: float) -> None:
    import io
    import os
    import tempfile
    from pathlib import Path

    from obdlab.formats.oci import digest_of
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.reference import Repository
    from tests.registry.server import running_registry

    found = {library: python for python in reversed(pythons) for library in LIBRARIES if _has(python, library)}
    results: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES if library in found}
    data = os.urandom(BLOB_SIZE)
    digest = digest_of(data)
    with tempfile.TemporaryDirectory() as directory, running_registry(Path(directory)) as server:
        repository = Repository(server.host, "benchmark", plain_http=True)
        RegistryClient().push_blob(repository, digest, len(data), lambda: io.BytesIO(data))
        for _ in range(rounds):
            for library, samples in results.items():
                command = [found[library], __file__, "--seconds", str(seconds), "--one", library]
                done = subprocess.run(
                    [*command, f"{repository.blobs_url}/{digest}"], capture_output=True, text=True, check=True
                )
                samples.append(json.loads(done.stdout))
    base = {key: _median(results["http.client"], key) for key in ("qd1", "qd16")}
    print(
        f"{'library':12} {'QD1 /s':>8} {'of bare':>8} {'QD16 /s':>8} {'of bare':>8} {'import ms':>10} {'RSS MiB':>8}"
    )
    for library, samples in results.items():
        one, many = _median(samples, "qd1"), _median(samples, "qd16")
        print(
            f"{library:12} {one:8.0f} {one / base['qd1']:8.2f} {many:8.0f} {many / base['qd16']:8.2f} "
            f"{_median(samples, 'import_ms'):10.0f} {_median(samples, 'rss_mib'):8.1f}"
        )


def _median(samples: list[dict[str, float]], key: str) -> float:
    return statistics.median(sample[key] for sample in samples)


def _has(python: str, library: str) -> bool:
    return subprocess.run([python, "-c", f"import {library}"], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main()
