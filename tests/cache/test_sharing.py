"""The block cache between threads and processes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from obdlab.cache import fetching
from obdlab.cache.cachedblob import CachedBlob
from obdlab.errors import SourceError
from tests.cache.origin import DATA, DIGEST, UNIT, Origin, open_cached, wait_until


def test_threads_reading_and_evicting(tmp_path: Path) -> None:
    failures: list[str] = []

    def worker(seed: int, blob: CachedBlob) -> None:
        generator = random.Random(seed)
        for _ in range(400):
            offset = generator.randrange(len(DATA))
            length = min(generator.choice([1, 500, UNIT, 5 * UNIT]), len(DATA) - offset)
            if generator.random() < 0.1:
                blob.evict(offset, length)
            elif blob.read_at(offset, length) != DATA[offset : offset + length]:
                failures.append(f"wrong bytes at {offset}")

    origin = Origin(before=lambda offset, length: time.sleep(0.0005))
    with (
        open_cached(tmp_path, origin, readahead_max=8 * UNIT) as one,
        open_cached(tmp_path, origin, readahead_max=8 * UNIT) as two,
    ):
        threads = [threading.Thread(target=worker, args=(seed, (one, two)[seed % 2])) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


_WORKER = """
import random, sys
from pathlib import Path
from obdlab.blob import MemoryBlob
from obdlab.cache import fetching
from obdlab.cache.blockcache import BlockCache
directory, digest, unit, seed, rounds, size, seed_of_data = sys.argv[1:]
data = random.Random(int(seed_of_data)).randbytes(int(size))
generator = random.Random(int(seed))
print("ready", flush=True)
for _ in range(int(rounds)):
    with BlockCache(directory, unit=int(unit)).open(MemoryBlob(data, "origin"), digest) as blob:
        for _ in range(200):
            offset = generator.randrange(len(data))
            length = min(generator.choice([1, 5000, 70000]), len(data) - offset)
            if generator.random() < 0.05:
                blob.evict(offset, length)
            assert blob.read_at(offset, length) == data[offset : offset + length], offset
"""


def start_worker(directory: Path, seed: int, rounds: int) -> subprocess.Popen[str]:
    arguments = [str(directory), DIGEST, str(UNIT), str(seed), str(rounds), str(len(DATA)), "7"]
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_share_one_cache(tmp_path: Path) -> None:
    workers = [start_worker(tmp_path, seed, 5) for seed in range(3)]
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors
    assert len(list((tmp_path / "blobs").glob("*/*"))) == 1


@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_writing(tmp_path: Path, rounds: int) -> None:
    generator = random.Random(5)
    for number in range(rounds):
        worker = start_worker(tmp_path, number, 10_000)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0, 0.05))
        worker.kill()
        worker.communicate(timeout=30)
        with open_cached(tmp_path, Origin()) as blob:
            assert blob.read_at(0, len(DATA)) == DATA
            blob.evict(0, len(DATA))


# -- one fetch for all processes -------------------------------------------------------------------------------------


_READER = """
import os, random, sys, time
from pathlib import Path
from obdlab.blob import MemoryBlob
from obdlab.cache.blockcache import BlockCache
directory, digest, size, order = sys.argv[1:]
data = random.Random(7).randbytes(int(size))
class Counting(MemoryBlob):
    asked = 0
    def read_at(self, offset, length, call=None):
        Counting.asked += length
        print("fetches", flush=True)
        time.sleep(0.01)
        return super().read_at(offset, length, call)
with BlockCache(directory, unit=4096, readahead_max=32768).open(Counting(data, "origin"), digest) as blob:
    offsets = list(range(0, len(data), 3000))
    if order != "0":
        random.Random(order).shuffle(offsets)
    print("ready", flush=True)
    sys.stdin.readline()
    for offset in offsets:
        length = min(9000, len(data) - offset)
        assert blob.read_at(offset, length) == data[offset : offset + length], offset
    quiet = time.monotonic() + 60
    while blob._fetches._flights and time.monotonic() < quiet:
        time.sleep(0.001)
    print("asked", Counting.asked, flush=True)
"""


def start_reader(directory: Path, order: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _READER, str(directory), DIGEST, str(len(DATA)), str(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.parametrize("orders", [(0, 0, 0, 0), (0, 1, 2, 3)])
def test_processes_that_miss_the_same_fetch_it_once(tmp_path: Path, orders: tuple[int, ...]) -> None:
    readers = [start_reader(tmp_path, order) for order in orders]
    for reader in readers:
        go(reader)
    asked = []
    for reader in readers:
        output, errors = reader.communicate(timeout=120)
        assert reader.returncode == 0, errors
        asked.append(int(output.split()[-1]))
    assert len(DATA) <= sum(asked) <= 1.02 * len(DATA), asked


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_while_fetching_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    monkeypatch.setattr(fetching, "_OTHERS_S", 0.2 if how == signal.SIGSTOP else 60)
    other = start_reader(tmp_path, 0)
    try:
        go(other)
        assert other.stdout is not None
        assert other.stdout.readline() == "fetches\n"
        other.send_signal(how)
        with open_cached(tmp_path, Origin()) as blob:
            for offset in range(0, len(DATA), 10_000):
                length = min(10_000, len(DATA) - offset)
                assert blob.read_at(offset, length) == DATA[offset : offset + length]
    finally:
        other.kill()
        other.communicate(timeout=30)


def test_of_units_that_another_fetches_the_others_are_fetched_meanwhile(tmp_path: Path) -> None:
    release, reached = threading.Event(), threading.Event()

    def hold(offset: int, length: int) -> None:
        reached.set()
        release.wait(60)

    origin = Origin()
    with open_cached(tmp_path, Origin(before=hold)) as slow, open_cached(tmp_path, origin) as blob:
        threads = [threading.Thread(target=slow.read_at, args=(4 * UNIT, 2 * UNIT))]
        results: list[bytes] = []
        threads.append(threading.Thread(target=lambda: results.append(blob.read_at(0, 10 * UNIT))))
        threads[0].start()
        assert reached.wait(60)
        threads[1].start()
        wait_until(lambda: origin.reads != [])
        assert origin.reads == [(0, 4 * UNIT)]
        release.set()
        for thread in threads:
            thread.join()
        assert results == [DATA[: 10 * UNIT]]
        assert origin.reads == [(0, 4 * UNIT), (6 * UNIT, 4 * UNIT)]


def test_a_reader_that_waited_for_another_process_is_no_hit(tmp_path: Path) -> None:
    release = threading.Event()
    first = Origin(before=lambda offset, length: release.wait(60) and None)
    with open_cached(tmp_path, first) as one, open_cached(tmp_path, second := Origin()) as two:
        got: list[bytes] = []
        readers = [threading.Thread(target=lambda: one.read_at(0, 10))]
        readers[0].start()
        wait_until(lambda: len(first.reads) > 0)
        readers.append(threading.Thread(target=lambda: got.append(two.read_at(0, 10))))
        readers[1].start()
        wait_until(lambda: two.demand.quiet_s() == 0)
        release.set()
        for reader in readers:
            reader.join(60)
        assert got == [DATA[:10]]
        assert second.reads == []
        assert two.statistics() | {"misses": 1, "hits": 0, "requests": 0} == two.statistics()


def test_an_error_of_another_process_is_not_ours(tmp_path: Path) -> None:
    reached = threading.Event()

    def fail(offset: int, length: int) -> None:
        reached.set()
        time.sleep(0.05)
        raise SourceError("out of order", blob="origin", offset=offset)

    with open_cached(tmp_path, Origin(before=fail)) as bad, open_cached(tmp_path, Origin()) as blob:

        def read_bad() -> None:
            with pytest.raises(SourceError, match="out of order"):
                bad.read_at(0, UNIT)

        thread = threading.Thread(target=read_bad)
        thread.start()
        assert reached.wait(60)
        assert blob.read_at(0, UNIT) == DATA[:UNIT]
        thread.join()
