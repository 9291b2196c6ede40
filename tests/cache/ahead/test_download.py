"""Background download: all of a blob comes, once, verified, and in nobody's way."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.cache.admin import entries
from obdlab.cache.ahead.download import BackgroundDownload, DownloadOptions
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.space import CacheSpace
from obdlab.call import Call
from obdlab.errors import SourceError
from obdlab.formats.oci import digest_of
from tests.cache.origin import Origin, wait_until
from tests.cache.test_admin import flip

UNIT = 4096
PIECE = 256 << 10
DATA = random.Random(21).randbytes(6 * PIECE + 5 * UNIT + 77)
DIGEST = digest_of(DATA)
AT_ONCE = DownloadOptions(delay_s=0, delay_extra_s=0, bytes_per_s=0, tries=3)


def origin(before: Callable[[int, int], None] | None = None) -> Origin:
    return Origin(DATA, before)


def open_cached(directory: Path, source: MemoryBlob, **options: int) -> CachedBlob:
    options = {"unit": UNIT, "readahead_max": 0, **options}
    blob = BlockCache(directory, **options).open(source, DIGEST)
    assert isinstance(blob, CachedBlob)
    return blob


def download(*blobs: CachedBlob, options: DownloadOptions = AT_ONCE) -> BackgroundDownload:
    started = BackgroundDownload(blobs, options)
    started.start()
    return started


def verified(directory: Path) -> list[bool]:
    return [entry.verified for entry in entries(CacheSpace(directory))]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obdlab.cache.ahead.download._LATER_S", 0.02)


def test_all_comes_once_and_the_origin_is_not_asked_any_more(tmp_path: Path) -> None:
    source = origin()
    with open_cached(tmp_path, source) as blob:
        blob.read_at(PIECE + 5, 3 * UNIT)
        assert download(blob).wait(60)
        assert verified(tmp_path) == [True]
        counters = blob.statistics()
        assert counters["demand_bytes"] + counters["background_bytes"] == len(DATA)
        asked = len(source.reads)
        assert blob.read_at(0, len(DATA)) == DATA
        assert max(length for _, length in source.reads) <= PIECE
        assert len(source.reads) == asked
    source = origin()
    with open_cached(tmp_path, source) as blob:  # and the next time nothing is to be done
        assert download(blob).wait(60)
        assert blob.read_at(7, 10_000) == DATA[7:10_007]
        assert source.reads == []


def test_the_missing_piece_after_what_is_cached(tmp_path: Path) -> None:
    piece, units = PIECE // UNIT, -(-len(DATA) // UNIT)
    with open_cached(tmp_path, origin()) as blob:
        assert blob.missing_piece(0) == (0, piece)
        blob.read_at(0, PIECE + 5 * UNIT)
        assert blob.missing_piece(0) == (piece + 5, 2 * piece + 5)
        blob.read_at(2 * PIECE, UNIT)
        assert blob.missing_piece(0) == (piece + 5, 2 * piece)
        assert blob.missing_piece(2 * piece) == (2 * piece + 1, 3 * piece + 1)
        assert blob.missing_piece(units - 1) == (units - 1, units)
        blob.read_at(0, len(DATA))
        assert blob.missing_piece(0) is None


def test_little_is_fetched_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("obdlab.cache.ahead.download._MOST_LOST", PIECE)
    data = random.Random(22).randbytes(64 * PIECE)
    source = Origin(data)
    with closing(BlockCache(tmp_path, unit=UNIT, readahead_max=0).open(source, digest_of(data))) as blob:
        assert isinstance(blob, CachedBlob)
        monkeypatch.setattr("obdlab.cache.unitfiles.CacheFiles.store", refuse)
        assert download(blob).wait(60)
    assert sum(length for _, length in source.reads) < 64 * PIECE


def test_readers_meanwhile_get_right_bytes(tmp_path: Path) -> None:
    failures: list[int] = []
    with open_cached(tmp_path, origin(lambda offset, length: time.sleep(0.001)), readahead_max=PIECE) as blob:
        started = download(blob, options=DownloadOptions(0, 0, 0, 3))

        def read(seed: int) -> None:
            chooser = random.Random(seed)
            while not started.wait(0):
                offset = chooser.randrange(len(DATA) - 20_000)
                if blob.read_at(offset, 20_000) != DATA[offset : offset + 20_000]:
                    failures.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert verified(tmp_path) == [True]
        assert blob.read_at(0, len(DATA)) == DATA


def test_waits_while_a_reader_waits(tmp_path: Path) -> None:
    release, reader_waits = threading.Event(), threading.Event()
    readers: set[int] = set()
    background: list[int] = []

    def before(offset: int, length: int) -> None:
        if threading.get_ident() not in readers:
            background.append(offset)
        elif not reader_waits.is_set():
            reader_waits.set()
            release.wait(60)

    with open_cached(tmp_path, origin(before)) as blob:

        def read() -> None:
            readers.add(threading.get_ident())
            assert blob.read_at(5 * PIECE, 10) == DATA[5 * PIECE : 5 * PIECE + 10]

        reader = threading.Thread(target=read)
        reader.start()
        assert reader_waits.wait(60)
        started = download(blob)
        assert not started.wait(0.3)
        assert background == []
        release.set()
        reader.join()
        assert started.wait(60)
        assert verified(tmp_path) == [True]


def test_wrong_bytes_are_fetched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class WrongOnce(Origin):
        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            data = super().read_at(offset, length, call)
            return data if len(self.reads) != 3 else bytes(length)

    with open_cached(tmp_path, WrongOnce(DATA)) as blob:
        assert download(blob).wait(60)
        assert verified(tmp_path) == [True]
        assert blob.read_at(0, len(DATA)) == DATA
    assert caplog.text.count("does not match its digest") == 1


def test_an_origin_that_is_always_wrong_leaves_nothing(tmp_path: Path) -> None:
    wrong = Origin(bytes(len(DATA)))
    with open_cached(tmp_path, wrong) as blob:
        assert download(blob).wait(60)
        assert sum(length for _, length in wrong.reads) == AT_ONCE.tries * len(DATA)
        (entry,) = entries(CacheSpace(tmp_path))
        assert (entry.verified, entry.cached_bytes) == (False, 0)


def test_a_failing_origin_is_asked_again(tmp_path: Path) -> None:
    source = origin()

    def fail(offset: int, length: int) -> None:
        if len(source.reads) in (2, 5):
            raise SourceError("out of order", blob="origin", offset=offset, temporary=True)

    source.before = fail
    with open_cached(tmp_path, source) as blob:
        assert download(blob).wait(60)
        assert verified(tmp_path) == [True]
        assert blob.statistics()["background_bytes"] == len(DATA)  # nothing twice


def test_damage_on_disk_is_healed_before_it_is_verified(tmp_path: Path) -> None:
    with open_cached(tmp_path, origin()) as blob:
        blob.read_at(0, len(DATA))
    flip(tmp_path / "blobs" / "local" / DIGEST / "data", 3 * UNIT)
    source = origin()
    with open_cached(tmp_path, source) as blob:
        assert download(blob).wait(60)
        assert source.reads == [(3 * UNIT, UNIT)]
        assert verified(tmp_path) == [True]


def test_a_unit_lost_after_the_blob_was_verified(tmp_path: Path) -> None:
    with open_cached(tmp_path, origin()) as blob:
        assert download(blob).wait(60)
        blob._units.drop(0, 1)
        assert verified(tmp_path) == [False]
        assert blob.read_at(0, len(DATA)) == DATA


def test_a_cache_too_small_ends_it(tmp_path: Path) -> None:
    with open_cached(tmp_path, origin(), quota=len(DATA) // 2) as blob:
        assert download(blob).wait(60)
        assert blob.read_at(0, len(DATA)) == DATA
    assert True not in verified(tmp_path)


def test_two_that_share_a_cache_download_once(tmp_path: Path) -> None:
    sources = [origin(lambda offset, length: time.sleep(0.002)) for _ in range(2)]
    with ExitStack() as opened:
        blobs = [opened.enter_context(open_cached(tmp_path, source)) for source in sources]
        started = [download(blob) for blob in blobs]
        assert all(one.wait(60) for one in started)
        assert sum(length for source in sources for _, length in source.reads) == len(DATA)


def test_closing_ends_it(tmp_path: Path) -> None:
    for options in (DownloadOptions(delay_s=1000), DownloadOptions(0, 0, bytes_per_s=PIECE / 1000)):
        source = origin()
        blob = open_cached(tmp_path, source)
        started = download(blob, options=options)
        time.sleep(0.05)
        blob.close()
        assert started.wait(60)
        wait_until(lambda source=source: source.closed == 1)


def test_the_start_is_put_off(tmp_path: Path) -> None:
    asked: list[float] = []
    with open_cached(tmp_path, origin(lambda offset, length: asked.append(time.monotonic()))) as blob:
        begin = time.monotonic()
        assert download(blob, options=DownloadOptions(0.3, 0.2, 0, 3)).wait(60)
        assert min(asked) - begin >= 0.3
        assert verified(tmp_path) == [True]


def test_the_rate_is_kept(tmp_path: Path) -> None:
    with open_cached(tmp_path, origin()) as blob:
        begin = time.monotonic()
        assert download(blob, options=DownloadOptions(0, 0, bytes_per_s=8 * PIECE)).wait(60)
        assert time.monotonic() - begin >= 6 / 8  # all but the last piece have to be paid for
        assert verified(tmp_path) == [True]


_DOWNLOADER = """
import random, sys, time
from obdlab.blob import MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.ahead.download import BackgroundDownload, DownloadOptions
directory, digest, size = sys.argv[1:]
class Slow(MemoryBlob):
    def read_at(self, offset, length, call=None):
        time.sleep(0.01)
        return super().read_at(offset, length, call)
blob = BlockCache(directory, unit=4096).open(Slow(random.Random(21).randbytes(int(size)), "slow"), digest)
download = BackgroundDownload([blob], DownloadOptions(0, 0, 0, 3))
print("ready", flush=True)
download.start()
download.wait(60)
"""


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path: Path, rounds: int) -> None:
    generator = random.Random(4)
    for number in range(rounds):
        directory = tmp_path / str(number)
        process = subprocess.Popen(
            [sys.executable, "-c", _DOWNLOADER, str(directory), DIGEST, str(len(DATA))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0, 0.12))
        process.kill()
        process.communicate(timeout=30)
        kept = sum(entry.cached_bytes for entry in entries(CacheSpace(directory)))
        source = origin()
        with open_cached(directory, source) as blob:
            assert download(blob).wait(60)
            assert verified(directory) == [True]
            assert blob.read_at(0, len(DATA)) == DATA
        assert sum(length for _, length in source.reads) == len(DATA) - kept
