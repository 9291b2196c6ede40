"""The block cache where threads and processes meet: each test holds one of them where the other one is dangerous."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from obdlab.cache.admin import blobs_of, check_blob
from obdlab.cache.ahead.download import BackgroundDownload, DownloadOptions
from obdlab.cache.ahead.prefetch import Prefetch
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.space import _LEDGER, CacheSpace, disk_usage
from obdlab.cache.unitfiles import CacheFiles
from obdlab.call import Call
from obdlab.formats.oci import digest_of
from tests.cache.origin import DATA, DIGEST, UNIT, Origin, open_cached, wait_until

WAIT_S = 60.0
UNITS = -(-len(DATA) // UNIT)
AT_ONCE = DownloadOptions(delay_s=0, delay_extra_s=0, bytes_per_s=0, tries=1000)


@pytest.fixture
def switching(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have threads change places all the time, and so wait longer for each other than a store usually may."""
    monkeypatch.setattr("obdlab.cache.space._WAIT_TO_STORE_S", WAIT_S)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def once(function: Callable[[], object]) -> Callable[[], None]:
    """Return what calls a function the first time that it is called."""
    left = [function]

    def call() -> None:
        if left:
            left.pop()()

    return call


# -- verified --------------------------------------------------------------------------------------------------------


def test_units_evicted_while_the_blob_is_hashed_leave_it_unverified(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob, open_cached(tmp_path, Origin()) as other:
        assert blob.read_at(0, len(DATA)) == DATA
        load = blob._units.load

        def load_and_lose(first: int, stop: int) -> bytes:
            data = load(first, stop)
            if stop == UNITS:  # all of it has been hashed
                other.evict(0, UNIT)
            return data

        blob._units.load = load_and_lose  # type: ignore[method-assign]
        assert not blob.verify()
        assert not blob.verified
        assert blob.missing_piece(0) == (0, 1)
        blob._units.load = load  # type: ignore[method-assign]
        blob.fetch_in_background(0, 1)
        assert blob.verify()
        assert blob.verified


def test_a_cache_cleared_while_the_blob_is_hashed_leaves_it_unverified(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        load = blob._units.load

        def load_and_lose(first: int, stop: int) -> bytes:
            data = load(first, stop)
            if stop == UNITS:
                shutil.rmtree(blob._files.directory)
                fresh = CacheFiles.open(blob._units._space, blob._files.directory, blob.size, UNIT)
                blob._files.replace(fresh)
            return data

        blob._units.load = load_and_lose  # type: ignore[method-assign]
        assert not blob.verify()
        assert not blob.verified
        assert not blob._files.header.verified


def test_units_evicted_while_the_blob_is_checked_leave_it_unverified(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        (directory,) = blobs_of(blob._units._space)
        lose = once(lambda: blob.evict(0, UNIT))
        checked = check_blob(blob._units._space, directory, repair=False, progress=lambda _: lose())
        assert checked is not None
        assert not blob.verified


def test_a_generation_that_is_over_marks_nothing(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, len(DATA))
        files = blob._files
        generation = files.header.generation
        assert files.mark_verified(generation)
        files.drop(3, 4)
        assert not blob.verified
        assert not files.mark_verified(generation)
        assert not blob.verified


# -- one fetch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["prefetch", "background", "read"])
def test_threads_claim_a_unit_once(tmp_path: Path, how: str) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin) as blob, ThreadPoolExecutor(2) as threads:
        hold = blob._holders.hold
        meeting = threading.Barrier(2)

        # Between looking whether somebody has claimed a unit and claiming it: there two may not meet.
        def hold_together() -> bool:
            with suppress(threading.BrokenBarrierError):
                meeting.wait(1)
            return hold()

        fetch = {
            "prefetch": lambda: blob.prefetch(0, 1),
            "background": lambda: blob.fetch_in_background(0, 1),
            "read": lambda: blob.read_at(0, UNIT),
        }[how]
        blob._holders.hold = hold_together  # type: ignore[method-assign]
        for done in [threads.submit(fetch) for _ in range(2)]:
            done.result(WAIT_S)
        blob._holders.hold = hold  # type: ignore[method-assign]
        assert origin.reads == [(0, UNIT)]


def test_what_another_process_has_stored_since_we_looked_is_not_fetched_again(tmp_path: Path) -> None:
    first, second = Origin(), Origin()
    with open_cached(tmp_path, first) as one, open_cached(tmp_path, second) as two:
        files = two._units.files
        claim = files.claim
        fetch = once(lambda: one.read_at(0, 4 * UNIT))

        def claim_late(begin: int, end: int) -> int | None:
            fetch()
            return claim(begin, end)

        files.claim = claim_late  # type: ignore[method-assign]
        assert two.read_at(0, UNIT) == DATA[:UNIT]
        assert len(first.reads) == 1
        assert not second.reads


@pytest.mark.parametrize("taken", [None, (0, 1), (1, 3), (5, 6), (3, 4)])
def test_a_miss_takes_the_free_units_of_its_extent_and_leaves_no_claim(
    tmp_path: Path, taken: tuple[int, int] | None
) -> None:
    origin = Origin()
    with (
        open_cached(tmp_path, origin, extent=8 * UNIT, readahead_max=0, deadline_s=30.0) as one,
        open_cached(tmp_path, Origin()) as two,
    ):
        one.opened(30.0)
        files = two._units.files
        two.read_at(2 * UNIT, UNIT)  # cached in the middle of the extent
        if taken is not None:
            assert files.claim(*taken) is None
        if taken != (3, 4):
            assert one.read_at(3 * UNIT, 10) == DATA[3 * UNIT : 3 * UNIT + 10]
            # From the cached unit, or from the claimed ones, to the next claimed one.
            stop = 5 if taken == (5, 6) else 8
            assert origin.reads == [(3 * UNIT, (stop - 3) * UNIT)]
        else:  # the unit itself: the reader waits for it
            with ThreadPoolExecutor(1) as threads:
                read = threads.submit(one.read_at, 3 * UNIT, 10)
                wait_until(lambda: one._fetches._flights != {})
                assert origin.reads == []
                files.unclaim(*taken)
                assert read.result(WAIT_S) == DATA[3 * UNIT : 3 * UNIT + 10]
        assert one.read_at(2 * UNIT, 10) == DATA[2 * UNIT : 2 * UNIT + 10]  # a first use, from the files
        if taken is not None:
            files.unclaim(*taken)
        assert files.claim(0, files.units) is None, "a claim was left"


def test_the_first_use_of_a_cached_unit_claims_nothing(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as one, open_cached(tmp_path, Origin()) as two:
        one.read_at(0, 4 * UNIT)
        claims: list[tuple[int, int]] = []
        two._units.files.claim = lambda first, stop: claims.append((first, stop))  # type: ignore[method-assign]
        assert two.read_at(UNIT, 3 * UNIT) == DATA[UNIT : 4 * UNIT]
        assert claims == []
        two.read_at(5 * UNIT, 10)
        assert claims == [(5, 6)]


def test_units_stay_claimed_until_they_are_stored(tmp_path: Path) -> None:
    first, second = Origin(), Origin()
    with open_cached(tmp_path, first) as one, open_cached(tmp_path, second) as two, ThreadPoolExecutor(2) as threads:
        store = one._units.store
        others: list[object] = []

        def store_late(unit: int, data: bytes) -> None:
            # Another process, and another thread of this one, want the same before it is stored.
            asked = threads.submit(two.read_at, 0, UNIT)
            near = threads.submit(one.read_at, 0, UNIT)
            others.append(asked)
            assert near.result(WAIT_S) == DATA[:UNIT]  # of the fetch that is over
            wait_until(lambda: bool(two._fetches._flights) or asked.done())
            assert not second.reads
            store(unit, data)

        one._units.store = store_late  # type: ignore[method-assign]
        assert one.read_at(0, UNIT) == DATA[:UNIT]
        assert others[0].result(WAIT_S) == DATA[:UNIT]  # type: ignore[attr-defined]
    assert len(first.reads) == 1
    assert not second.reads


def test_a_second_download_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obdlab.cache.ahead.download._LATER_S", 0.01)
    looked: Counter[int] = Counter()
    verified = CachedBlob.verified.fget  # type: ignore[attr-defined]

    def counted(blob: CachedBlob) -> bool:
        looked[id(blob)] += 1
        return bool(verified(blob))

    monkeypatch.setattr(CachedBlob, "verified", property(counted))
    began, go_on = threading.Event(), threading.Event()

    def hold(offset: int, length: int) -> None:
        began.set()
        assert go_on.wait(WAIT_S)

    data = DATA * 10  # several pieces
    digest = digest_of(data)
    first, second = Origin(data, hold), Origin(data)
    with ExitStack() as opened:
        opened.callback(go_on.set)
        one, two = (
            opened.enter_context(BlockCache(tmp_path, unit=UNIT, readahead_max=0).open(origin, digest))
            for origin in (first, second)
        )
        assert isinstance(one, CachedBlob)
        assert isinstance(two, CachedBlob)
        downloads = [BackgroundDownload([blob], AT_ONCE) for blob in (one, two)]
        downloads[0].start()
        assert began.wait(WAIT_S)
        downloads[1].start()
        wait_until(lambda: looked[id(two)] >= 3)  # it has tried, more than once
        assert not second.reads
        go_on.set()
        assert all(download.wait(WAIT_S) for download in downloads)
        assert not second.reads
        assert sum(length for _, length in first.reads) == len(data)
        assert one.verified
        assert two.verified


def test_prefetch_asks_for_each_piece_once_and_counts_what_is_under_way(tmp_path: Path, switching: None) -> None:
    most, now, lock = [0], [0], threading.Lock()

    class Slow(Origin):
        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            with lock:
                now[0] += length
                most[0] = max(most[0], now[0])
            try:
                return super().read_at(offset, length, call)
            finally:
                with lock:
                    now[0] -= length

    data = DATA * 60
    origin = Slow(data)
    with BlockCache(tmp_path, unit=UNIT, readahead_max=0).open(origin, digest_of(data)) as blob:
        assert isinstance(blob, CachedBlob)
        # Every other 8 KiB, so that there are many pieces.
        ranges = [(0, at, at + 2 * UNIT) for at in range(0, len(data) - 4 * UNIT, 4 * UNIT)] * 2
        prefetch = Prefetch("trace", [blob], lambda: ranges)
        prefetch.start()
        assert prefetch.wait(WAIT_S)
        assert prefetch._under_way == 0
        fetched = Counter(origin.reads)
        assert set(fetched.values()) == {1}
        for _, begin, end in ranges:
            assert blob._files.present(begin // UNIT, end // UNIT) == [True, True]
        assert most[0] <= (3 << 20)
        assert blob.counters.prefetch_bytes == sum(length for _, length in origin.reads)


# -- closing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hit", "evict"])
def test_a_file_that_gets_the_number_of_a_closed_one_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    origin = Origin()
    blob = open_cached(tmp_path / "cache", origin)
    blob.read_at(0, 2 * UNIT)
    others: list[int] = []

    @once
    def close_and_open_others() -> None:  # as other threads would, between looking up the number and using it
        blob.close()
        others.extend(os.open(tmp_path / f"{number}", os.O_RDWR | os.O_CREAT) for number in range(4))

    pwrite = os.pwrite

    def late(fd: int, data: bytes, offset: int) -> int:
        close_and_open_others()
        return pwrite(fd, data, offset)

    blob._units.tick_at = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", late)
        if how == "hit":
            assert blob.read_at(0, UNIT) == DATA[:UNIT]
        else:
            blob.evict(0, UNIT)
    assert len(others) == 4
    assert [os.fstat(fd).st_size for fd in others] == [0] * 4
    assert origin.closed == 1
    for fd in others:
        os.close(fd)


def test_a_closed_blob_evicts_nothing(tmp_path: Path) -> None:
    origin = Origin()
    blob = open_cached(tmp_path, origin)
    blob.read_at(0, UNIT)
    blob.close()
    blob.evict(0, UNIT)
    assert origin.evicted == []
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, UNIT) == DATA[:UNIT]
    assert len(origin.reads) == 1


def test_closing_while_pieces_are_claimed_ahead_leaves_no_flight(tmp_path: Path) -> None:
    origin = Origin()
    blob = open_cached(tmp_path, origin)
    hold = blob._holders.hold
    held: list[bool] = []

    def hold_late() -> bool:
        if held:  # after _fetch_ahead() has looked if it is closed
            blob.close()
        held.append(hold())
        return held[-1]

    blob._holders.hold = hold_late  # type: ignore[method-assign]
    blob._fetches._fetch_ahead([(0, 1), (2, 3), (4, 5)])
    assert held == [True, False]
    wait_until(lambda: not blob._fetches._flights and origin.closed == 1)


# -- the ledger ------------------------------------------------------------------------------------------------------

_CALLS = ("pwrite", "posix_fallocate", "ftruncate", "rename", "unlink", "mkdir", "rmdir")


def dies_at(number: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a process that is killed after its ``number``-th change of a file; False if it makes fewer."""
    pid = os.fork()
    if pid == 0:
        left = [number]

        def deadly(name: str) -> Callable[..., object]:
            call = getattr(os, name)

            def made(*args: object, **options: object) -> object:
                done = call(*args, **options)
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done

            return made

        try:
            for name in _CALLS:
                setattr(os, name, deadly(name))
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def ledger_of(directory: Path) -> int:
    _, _, used = _LEDGER.unpack((directory / "usage").read_bytes())
    return int(used)


def fill(directory: Path) -> None:
    with open_cached(directory, Origin()) as blob:
        # Side by side: ext4 takes blocks for more than four extents when it writes the file back.
        for unit in range(6):
            blob.read_at(unit * UNIT, UNIT)


def evict_some(directory: Path) -> None:
    space = CacheSpace(directory)
    (blob,) = blobs_of(space)
    with space.changing(blob):
        files = CacheFiles.attach(blob)
        assert files is not None
        files.sweep(5 * UNIT, spare_used=False)


@pytest.mark.parametrize("work", [fill, evict_some], ids=["store", "evict"])
def test_a_process_killed_anywhere_leaves_no_ledger_that_is_too_small(
    tmp_path: Path, work: Callable[[Path], None]
) -> None:
    number = 0
    killed = True
    while killed:
        number += 1
        directory = tmp_path / str(number)
        directory.mkdir(mode=0o700)
        if work is evict_some:
            fill(directory)
        else:
            CacheSpace(directory).count()  # there is a ledger
        killed = dies_at(number, lambda directory=directory: work(directory))  # type: ignore[misc]
        assert ledger_of(directory) >= disk_usage(directory), number
    assert number > 5
    assert (tmp_path / str(number) / "blobs/local" / DIGEST / "data").exists()
