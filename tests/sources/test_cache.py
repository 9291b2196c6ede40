"""The block cache: right bytes whatever is read, by whomever, and whatever happened to its files."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import Blob, MemoryBlob
from obdlab.errors import FormatError, OutOfRangeError, SourceError
from obdlab.formats.oci import digest_of
from obdlab.sources import fetching
from obdlab.sources.cache import BlockCache
from obdlab.sources.cachedblob import CachedBlob
from obdlab.waiting import set_waiting_hook

UNIT = 4096
DATA = random.Random(7).randbytes(40 * UNIT + 123)
DIGEST = digest_of(DATA)


class Origin(MemoryBlob):
    """A blob that remembers what was asked of it, and does what a test wants before answering."""

    def __init__(self, data: bytes = DATA, before: Callable[[int, int], None] | None = None) -> None:
        super().__init__(data, "origin")
        self.reads: list[tuple[int, int]] = []
        self.before = before
        self.evicted: list[tuple[int, int]] = []
        self.closed = 0

    def read_at(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        if self.before is not None:
            self.before(offset, length)
        return super().read_at(offset, length)

    def evict(self, offset: int, length: int) -> None:
        self.evicted.append((offset, length))

    def close(self) -> None:
        self.closed += 1


def open_cached(directory: Path, origin: Blob, **options: int) -> CachedBlob:
    options = {"unit": UNIT, "readahead_max": 0, **options}
    blob = BlockCache(directory, **options).open(origin, DIGEST)
    assert isinstance(blob, CachedBlob)
    return blob


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.002)


# -- reading ---------------------------------------------------------------------------------------------------------

_READS = st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 10 * UNIT)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(reads=_READS, unit_shift=st.integers(12, 15), readahead=st.sampled_from([0, UNIT, 1 << 16]))
def test_any_reads_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, reads: list[tuple[int, int]], unit_shift: int, readahead: int
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    for _ in range(2):  # then again, from the files
        with open_cached(directory, Origin(), unit=1 << unit_shift, readahead_max=readahead) as blob:
            assert blob.size == len(DATA)
            for offset, length in reads:
                length = min(length, len(DATA) - offset)
                assert blob.read_at(offset, length) == DATA[offset : offset + length]


def test_missing_units_are_asked_for_once_and_together(tmp_path: Path) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(UNIT + 5, 3 * UNIT) == DATA[UNIT + 5 : 4 * UNIT + 5]
        assert origin.reads == [(UNIT, 4 * UNIT)]
        blob.read_at(0, 8 * UNIT)
        assert origin.reads[1:] == [(0, UNIT), (5 * UNIT, 3 * UNIT)]
        blob.read_at(len(DATA) - 1, 1)
        assert origin.reads[3:] == [(40 * UNIT, 123)]
        blob.read_at(0, 8 * UNIT)
        assert len(origin.reads) == 4
        assert blob.statistics() | {"hits": 1, "misses": 3, "requests": 4} == blob.statistics()
        assert blob.statistics()["demand_bytes"] == 8 * UNIT + 123


def test_whole_blob_cached_needs_no_origin(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, len(DATA))
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        assert origin.reads == []
    assert origin.closed == 1


def test_ranges_outside(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        for offset, length in [(-1, 1), (0, -1), (len(DATA), 1), (0, len(DATA) + 1), (-5, 10)]:
            with pytest.raises(OutOfRangeError):
                blob.read_at(offset, length)
        assert blob.read_at(len(DATA), 0) == b""


def test_empty_blob(tmp_path: Path) -> None:
    with BlockCache(tmp_path).open(MemoryBlob(b""), digest_of(b"")) as blob:
        assert blob.read_at(0, 0) == b""


def test_a_unit_of_zeros_is_cached_like_any_other(tmp_path: Path) -> None:
    origin = Origin(bytes(3 * UNIT))
    for _ in range(2):
        with BlockCache(tmp_path, unit=UNIT).open(origin, DIGEST) as blob:
            assert blob.read_at(0, 3 * UNIT) == bytes(3 * UNIT)
    assert len(origin.reads) == 1


@pytest.mark.parametrize(
    "digest", ["", "../../etc", "sha256:..", f"sha256:{'A' * 64}", f"sha256:{'a' * 63}/", "md5:00"]
)
def test_what_is_no_digest_becomes_no_path(tmp_path: Path, digest: str) -> None:
    with pytest.raises(FormatError):
        BlockCache(tmp_path / "cache").open(Origin(), digest)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unit", [0, -4096, 1024, 5000])
def test_unit_that_makes_no_sense(tmp_path: Path, unit: int) -> None:
    with pytest.raises(ValueError, match="cache unit"):
        BlockCache(tmp_path, unit=unit)


def test_no_thread_before_the_first_read(tmp_path: Path) -> None:
    before = threading.active_count()
    with open_cached(tmp_path, Origin(), readahead_max=1 << 20):
        assert threading.active_count() == before


# -- failing origins -------------------------------------------------------------------------------------------------


def test_error_of_the_origin_reaches_the_reader_and_is_not_kept(tmp_path: Path) -> None:
    def fail(offset: int, length: int) -> None:
        raise SourceError("out of order", blob="origin", offset=offset)

    origin = Origin(before=fail)
    with open_cached(tmp_path, origin) as blob:
        with pytest.raises(SourceError, match="out of order"):
            blob.read_at(0, 10)
        origin.before = None
        assert blob.read_at(0, 10) == DATA[:10]
        assert blob.statistics()["failed_requests"] == 1


def test_short_answer_of_the_origin_is_an_error(tmp_path: Path) -> None:
    class Short(Origin):
        def read_at(self, offset: int, length: int) -> bytes:
            return super().read_at(offset, length)[:-1]

    with open_cached(tmp_path, Short()) as blob, pytest.raises(SourceError, match="short read"):
        blob.read_at(UNIT, 10)


def test_waiting_for_another_threads_fetch_ends_at_the_deadline(tmp_path: Path) -> None:
    release = threading.Event()
    origin = Origin(before=lambda offset, length: release.wait(30) and None)
    blob = BlockCache(tmp_path, unit=UNIT, deadline_s=0.2).open(origin, DIGEST)
    first = threading.Thread(target=lambda: blob.read_at(0, 10))
    first.start()
    wait_until(lambda: origin.reads != [])
    with pytest.raises(SourceError, match="deadline") as caught:
        blob.read_at(5, 10)
    assert caught.value.temporary
    release.set()
    first.join()
    assert blob.read_at(5, 10) == DATA[5:15]
    blob.close()


def test_one_fetch_for_many_threads(tmp_path: Path) -> None:
    release = threading.Event()
    origin = Origin(before=lambda offset, length: release.wait(30) and None)
    waits = []
    with open_cached(tmp_path, origin) as blob:
        results = []

        def reader(number: int) -> None:
            set_waiting_hook(lambda: waits.append(number))
            results.append(blob.read_at(100 + number, 50) == DATA[100 + number : 150 + number])
            set_waiting_hook(None)

        threads = [threading.Thread(target=reader, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(set(waits)) == 6)  # all six said that they were about to wait
        release.set()
        for thread in threads:
            thread.join()
        assert results == [True] * 6
        assert origin.reads == [(0, UNIT)]


def test_a_hit_does_not_wait(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, UNIT)
        set_waiting_hook(lambda: pytest.fail("a hit said that it would wait"))
        try:
            assert blob.read_at(10, 100) == DATA[10:110]
        finally:
            set_waiting_hook(None)


# -- damage ----------------------------------------------------------------------------------------------------------


def damage_flip(files: Path, generator: random.Random) -> None:
    with (files / "data").open("r+b") as file:
        file.seek(generator.randrange(len(DATA)))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1 << generator.randrange(8)]))


def damage_cut(files: Path, generator: random.Random) -> None:
    os.truncate(files / "data", generator.randrange(len(DATA)))


def damage_remove_data(files: Path, generator: random.Random) -> None:
    (files / "data").unlink()


def damage_lengthen(files: Path, generator: random.Random) -> None:
    with (files / "data").open("ab") as file:
        file.write(b"more")


def damage_sums(files: Path, generator: random.Random) -> None:
    raw = bytearray((files / "sums").read_bytes())
    raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    (files / "sums").write_bytes(raw)


def damage_cut_sums(files: Path, generator: random.Random) -> None:
    os.truncate(files / "sums", generator.randrange((files / "sums").stat().st_size))


def damage_garble_sums(files: Path, generator: random.Random) -> None:
    (files / "sums").write_bytes(generator.randbytes((files / "sums").stat().st_size))


def damage_remove_sums(files: Path, generator: random.Random) -> None:
    (files / "sums").unlink()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        damage_cut,
        damage_remove_data,
        damage_lengthen,
        damage_sums,
        damage_cut_sums,
        damage_garble_sums,
        damage_remove_sums,
    ],
)
def test_damaged_files_heal(tmp_path: Path, damage: Callable[[Path, random.Random], None], seed: int) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, len(DATA))
    damage(tmp_path / "blobs" / "local" / DIGEST, random.Random(seed))
    with open_cached(tmp_path, Origin()) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
    with open_cached(tmp_path, Origin()) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        assert blob.statistics()["requests"] == 0
        assert blob.statistics()["corrupt_units"] == 0


def test_a_flipped_bit_is_counted_logged_and_costs_one_unit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, len(DATA))
    damage_flip(tmp_path / "blobs" / "local" / DIGEST, random.Random(3))
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        assert blob.statistics()["corrupt_units"] == 1
    assert len(origin.reads) == 1
    assert f"checksum at offset {origin.reads[0][0]}" in caplog.text


def test_data_cut_while_open_is_fetched_again(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, len(DATA))
        os.truncate(tmp_path / "blobs" / "local" / DIGEST / "data", 5 * UNIT)
        assert blob.read_at(0, len(DATA)) == DATA


def test_evict_asks_again_and_passes_on(tmp_path: Path) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        blob.read_at(0, 4 * UNIT)
        blob.evict(UNIT + 10, 20)
        assert origin.evicted == [(UNIT + 10, 20)]
        assert blob.read_at(0, 4 * UNIT) == DATA[: 4 * UNIT]
        assert origin.reads == [(0, 4 * UNIT), (UNIT, UNIT)]
        assert blob.statistics()["evicted_units"] == 1


def test_evict_replaces_bytes_that_came_wrong(tmp_path: Path) -> None:
    wrong = Origin(bytes(len(DATA)))
    with open_cached(tmp_path, wrong) as blob, open_cached(tmp_path, Origin()) as other:
        assert blob.read_at(0, UNIT) == bytes(UNIT)
        assert other.read_at(0, UNIT) == bytes(UNIT)  # shared, and right as far as the cache can know
        other.evict(0, UNIT)
        assert other.read_at(0, UNIT) == DATA[:UNIT]
        assert blob.read_at(0, UNIT) == DATA[:UNIT]  # it noticed


def test_late_bytes_of_another_kind_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_OTHERS_S", 0.05)  # the second does not wait for the first
    release = threading.Event()
    late = Origin(bytes(len(DATA)), before=lambda offset, length: release.wait(30) and None)
    with open_cached(tmp_path, late) as slow, open_cached(tmp_path, Origin()) as other:
        reader = threading.Thread(target=lambda: slow.read_at(0, UNIT))
        reader.start()
        wait_until(lambda: late.reads != [])
        assert other.read_at(0, 2 * UNIT) == DATA[: 2 * UNIT]
        release.set()
        reader.join()
        assert other.read_at(0, 2 * UNIT) == bytes(UNIT) + DATA[UNIT : 2 * UNIT]
        assert other.statistics()["corrupt_units"] == 0


def test_units_another_process_took_away_are_not_used(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob, open_cached(tmp_path, Origin()) as other:
        blob.read_at(0, 4 * UNIT)
        other.evict(UNIT, UNIT)
        with (tmp_path / "blobs" / "local" / DIGEST / "data").open("r+b") as file:  # and its space is given back
            file.seek(UNIT)
            file.write(bytes(UNIT))
        assert blob.read_at(0, 4 * UNIT) == DATA[: 4 * UNIT]
        assert blob.statistics()["corrupt_units"] == 0


def test_other_unit_size_starts_anew_and_disturbs_nobody(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as old:
        old.read_at(0, len(DATA))
        with open_cached(tmp_path, Origin(), unit=2 * UNIT) as new:
            assert new.read_at(0, len(DATA)) == DATA
            assert new.statistics()["corrupt_units"] == 0
        assert old.read_at(0, len(DATA)) == DATA


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        monkeypatch.setattr(os, "pwrite", full)
        for _ in range(2):
            assert blob.read_at(100, 2 * UNIT) == DATA[100 : 100 + 2 * UNIT]
        assert len(origin.reads) == 2
        assert blob.statistics()["uncached_bytes"] == 6 * UNIT
        monkeypatch.undo()
        assert blob.read_at(100, 2 * UNIT) == DATA[100 : 100 + 2 * UNIT]
    assert caplog.text.count("No space left") == 1


@pytest.mark.kernel
def test_really_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "cache-test", tmp_path], check=True)
    try:
        origin = Origin()
        with open_cached(tmp_path, origin) as blob:  # 164 KiB do not fit
            assert blob.read_at(0, len(DATA)) == DATA
            for offset in range(0, len(DATA), UNIT):
                length = min(UNIT, len(DATA) - offset)
                assert blob.read_at(offset, length) == DATA[offset : offset + length]
            assert blob.statistics()["uncached_bytes"] > 0
        shutil.rmtree(tmp_path / "blobs")
        with suppress(OSError), (tmp_path / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with BlockCache(tmp_path, unit=UNIT).open(Origin(), DIGEST) as bare:  # not even the sums fit
            assert bare.read_at(5, len(DATA) - 5) == DATA[5:]
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert "not cached" in caplog.text


def test_a_manifest_that_lies_about_a_size_harms_nobody(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob, open_cached(tmp_path, Origin()) as second:
        blob.read_at(0, 30 * UNIT)
        with open_cached(tmp_path, Origin(DATA[: 5 * UNIT + 1])) as liar:
            assert liar.read_at(0, 5 * UNIT + 1) == DATA[: 5 * UNIT + 1]
        second.read_at(len(DATA) - 1, 1)  # writes at the end
        assert blob.read_at(0, len(DATA)) == DATA
        assert blob.statistics()["corrupt_units"] == 0


def test_cache_that_cannot_be_made_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blobs").write_text("a file where a directory should be")
    with BlockCache(tmp_path).open(Origin(), DIGEST) as blob:
        assert blob.read_at(5, 5) == DATA[5:10]
    assert "not cached" in caplog.text


# -- read-ahead ------------------------------------------------------------------------------------------------------


def test_sequential_readers_find_their_data_there(tmp_path: Path) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin, readahead_max=16 * UNIT) as blob:
        readers = [(0, 20 * UNIT), (20 * UNIT, len(DATA))]
        while readers:  # two interleaved streams
            offset, end = readers.pop(0)
            length = min(1000, end - offset)
            assert blob.read_at(offset, length) == DATA[offset : offset + length]
            if offset + length < end:
                readers.append((offset + length, end))
        counted = blob.statistics()
    assert counted["readahead_bytes"] > counted["demand_bytes"]
    assert counted["readahead_bytes"] + counted["demand_bytes"] == len(DATA)  # nothing twice
    assert sorted(origin.reads) == [(offset, length) for offset, length in sorted(set(origin.reads)) if length > 0]


def test_random_readers_pay_nothing(tmp_path: Path) -> None:
    data = bytes(2000 * UNIT)
    blob = BlockCache(tmp_path, unit=UNIT).open(Origin(data), DIGEST)
    generator = random.Random(11)
    for _ in range(200):
        blob.read_at(generator.randrange(2000) * UNIT, 100)
    counted = blob.statistics()  # type: ignore[attr-defined]
    assert counted["readahead_bytes"] < 0.2 * counted["demand_bytes"]
    blob.close()


def test_failing_read_ahead_leaves_no_trace(tmp_path: Path) -> None:
    main = threading.get_ident()

    def fail_in_background(offset: int, length: int) -> None:
        if threading.get_ident() != main:
            raise SourceError("background trouble", blob="origin", offset=offset, temporary=True)

    with open_cached(tmp_path, Origin(before=fail_in_background), readahead_max=8 * UNIT) as blob:
        for offset in range(0, len(DATA), 1000):
            length = min(1000, len(DATA) - offset)
            assert blob.read_at(offset, length) == DATA[offset : offset + length]


def test_closing_waits_for_no_one_and_breaks_nothing(tmp_path: Path) -> None:
    release = threading.Event()
    main = threading.get_ident()
    background = []

    def hold_background(offset: int, length: int) -> None:
        if threading.get_ident() != main:
            background.append(offset)
            release.wait(30)

    origin = Origin(before=hold_background)
    blob = open_cached(tmp_path, origin, readahead_max=8 * UNIT)
    blob.read_at(0, 3 * UNIT)
    blob.read_at(3 * UNIT, UNIT)
    wait_until(lambda: background != [])
    blob.close()
    blob.close()
    assert origin.closed == 0  # a fetch is still under way
    release.set()
    wait_until(lambda: origin.closed == 1)


# -- several at once -------------------------------------------------------------------------------------------------


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
from obdlab.sources import fetching
from obdlab.sources.cache import BlockCache
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


def test_a_sum_without_its_data_is_not_believed(tmp_path: Path) -> None:
    # What a crash could leave at worst, if it happened between the two writes in the other order.
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, len(DATA))
    with (tmp_path / "blobs" / "local" / DIGEST / "data").open("r+b") as file:
        file.seek(7 * UNIT + 2000)
        file.write(bytes(UNIT - 2000))
    with open_cached(tmp_path, Origin()) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        assert blob.statistics()["corrupt_units"] == 1


def test_a_size_beyond_belief_is_not_cached(tmp_path: Path) -> None:
    class Huge(Blob):
        name = "huge"
        size = 1 << 44

        def read_at(self, offset: int, length: int) -> bytes:
            return b"x" * length

    with BlockCache(tmp_path).open(Huge(), digest_of(b"huge")) as blob:
        assert blob.read_at(1 << 43, 3) == b"xxx"
    assert not list(tmp_path.rglob("sums"))


def test_a_read_after_close_is_an_error(tmp_path: Path) -> None:
    blob = BlockCache(tmp_path).open(MemoryBlob(DATA), digest_of(DATA))
    blob.read_at(0, 100)
    blob.close()
    with pytest.raises(SourceError, match="read after close"):
        blob.read_at(0, 100)
