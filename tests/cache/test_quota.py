"""The cache within its limits: never too large, never a wrong byte, whoever stores, evicts, reads or is killed."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.cache import eviction, space
from obdlab.cache.admin import clear
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.eviction import EvictingSpace, cached_blobs, evict, shrink
from obdlab.cache.layout import HEADER_SIZE, PAGE, last_use
from obdlab.cache.space import CacheSpace
from obdlab.cache.unitfiles import CacheFiles
from obdlab.call import Call
from obdlab.formats.oci import digest_of
from tests.cache import churn
from tests.cache.churn import BLOBS, SIZE, UNIT
from tests.cache.origin import locked

QUOTA = 700 << 10  # of 12 blobs with 244 KiB each
CONTENTS = [churn.content(number) for number in range(BLOBS)]
DIGESTS = [digest_of(content) for content in CONTENTS]
_SWEEP_PAUSE_S = eviction.SWEEP_PAUSE_S
# A file in many pieces takes a block for their places when it is written back, whenever that is.
_EXTENTS = 4096 * len(CONTENTS)


class Counted(MemoryBlob):
    """An origin that counts what it is asked for."""

    def __init__(self, number: int) -> None:
        super().__init__(CONTENTS[number], f"blob {number}")
        self.reads = 0

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.reads += 1
        return super().read_at(offset, length, call)


def open_blob(cache: BlockCache, number: int) -> CachedBlob:
    blob = cache.open(Counted(number), DIGESTS[number])
    assert isinstance(blob, CachedBlob)
    return blob


def fill(cache: BlockCache, number: int) -> None:
    with open_blob(cache, number) as blob:
        assert blob.read_at(0, SIZE) == CONTENTS[number]


def small_cache(directory: Path, quota: int = QUOTA) -> BlockCache:
    return BlockCache(directory, quota=quota, unit=UNIT, readahead_max=0)


def blob_files(directory: Path, number: int) -> Path:
    return directory / "blobs" / "local" / DIGESTS[number]


def take_back(directory: Path, wanted: int = 1 << 40) -> None:
    """Give back so much of each blob in turn, as an eviction does; twice, as units that were read are spared once."""
    space = CacheSpace(directory)
    for _ in range(2):
        for blob in cached_blobs(space.blobs):
            with space.changing(blob), suppress(FileNotFoundError):  # removed by an eviction that is under way
                shrink(blob, wanted)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "SWEEP_PAUSE_S", 0.05)
    monkeypatch.setattr(eviction, "_REST_S", 0.05)


def du(directory: Path) -> int:
    command = ["du", "-s", "--block-size=1", str(directory)]
    # Its status is 1 if a file goes while it looks; the sum is that of the others.
    return int(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()[-2])


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [4, pytest.param(120, marks=pytest.mark.slow)])
def test_many_blobs_in_several_processes(tmp_path: Path, seconds: float) -> None:
    workers = [churn.start(tmp_path, seed, quota=QUOTA, seconds=seconds) for seed in range(3)]
    largest = samples = 0
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    while any(worker.poll() is None for worker in workers):
        if (tmp_path / "usage").exists():
            with locked(tmp_path):
                largest = max(largest, du(tmp_path))
                samples += 1
        time.sleep(0.01)
    outputs = []
    for worker in workers:
        output, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors
        assert errors == ""
        assert "'corrupt_units': 0" in output
        outputs.append(output)
    assert any("'evicted_bytes': 0" not in output for output in outputs)  # it was tight
    assert samples > 20
    assert QUOTA // 2 < largest <= QUOTA + _EXTENTS


def test_least_recently_used_blobs_go_first(tmp_path: Path) -> None:
    cache = small_cache(tmp_path)
    for number in (0, 1, 0, 2):  # the third does not fit any more
        fill(cache, number)
    assert cache.space.wait_for_eviction(60)
    fill(cache, 2)
    with open_blob(cache, 0) as blob:
        assert blob.read_at(0, SIZE) == CONTENTS[0]
        assert blob.statistics()["requests"] == 0
    with open_blob(cache, 1) as blob:
        blob.read_at(0, SIZE)
        assert blob.statistics()["requests"] > 0
    assert cache.statistics()["evicted_bytes"] > 0
    assert du(tmp_path) <= QUOTA


def test_blobs_that_nobody_has_open_are_removed_and_open_ones_stay(tmp_path: Path) -> None:
    cache = small_cache(tmp_path)
    fill(cache, 0)
    with open_blob(cache, 1) as kept:
        kept.read_at(0, SIZE)
        take_back(tmp_path)
        assert cached_blobs(tmp_path / "blobs") == [blob_files(tmp_path, 1)]
        assert (blob_files(tmp_path, 1) / "data").stat().st_blocks == 0
        assert kept.read_at(0, SIZE) == CONTENTS[1]
    take_back(tmp_path)
    assert list((tmp_path / "blobs").iterdir()) == []


def test_units_not_read_lately_go_first(tmp_path: Path) -> None:
    with open_blob(small_cache(tmp_path, 0), 0) as blob:
        blob.read_at(0, SIZE)
        files = CacheFiles.attach(blob_files(tmp_path, 0))
        assert files is not None
        with closing(files):
            assert files.sweep(3 * UNIT) == 0  # all were read
            assert files.sweep(3 * UNIT) == 3 * UNIT
            assert files.present(0, 5) == [False] * 3 + [True] * 2
            blob._units.tick_at = 0  # a second later
            blob.read_at(3 * UNIT, 2 * UNIT)
            assert files.sweep(2 * UNIT) == 2 * UNIT
            assert files.present(0, 8) == [False] * 3 + [True] * 2 + [False] * 2 + [True]
        assert blob.read_at(0, SIZE) == CONTENTS[0]
        assert blob.statistics()["corrupt_units"] == 0


def test_all_units_read_after_a_pass_are_spared_by_the_next(tmp_path: Path) -> None:
    with open_blob(small_cache(tmp_path, 0), 0) as blob:
        blob.read_at(0, SIZE)
        files = CacheFiles.attach(blob_files(tmp_path, 0))
        assert files is not None
        with closing(files):
            for _ in range(3):
                assert files.sweep(UNIT) == 0  # all were read
                assert files.sweep(UNIT) == UNIT
                hand = files.header.hand
                blob._units.tick_at = 0  # a second later
                blob.read_at((hand + 9) * UNIT, UNIT)  # this read notices the pass
                blob.read_at(hand * UNIT, 2 * UNIT)
                assert files.sweep(UNIT) == UNIT
                assert files.present(hand, hand + 3) == [True, True, False]
                blob._units.tick_at = 0
                assert blob.read_at(0, SIZE) == CONTENTS[0]


def test_readers_look_for_a_pass_well_before_the_eviction_makes_the_next(tmp_path: Path) -> None:
    with open_blob(small_cache(tmp_path, 0), 0) as blob:
        blob.read_at(0, UNIT)
        assert blob._units.tick_at - time.monotonic() <= _SWEEP_PAUSE_S / 2


def test_nothing_is_evicted_for_a_store_that_would_never_fit(tmp_path: Path) -> None:
    cache = small_cache(tmp_path)
    fill(cache, 0)
    sums = (blob_files(tmp_path, 0) / "sums").open("rb")
    with sums:
        for length, evicted in ((10 * QUOTA, False), (QUOTA * 13 // 16, True)):
            with pytest.raises(space.CacheFullError), cache.space.room(sums.fileno(), length):
                pass
            assert cache.space.wait_for_eviction(60)
            assert (cache.statistics()["evicted_bytes"] > 0) is evicted
        with cache.space.room(sums.fileno(), length):
            pass


def test_an_open_blob_loses_nothing_while_another_has_enough(tmp_path: Path) -> None:
    cache = small_cache(tmp_path, 0)
    with open_blob(cache, 0) as blob:
        blob.read_at(0, SIZE)
        fill(cache, 1)
        narrow = CacheSpace(tmp_path, quota=500 << 10)
        assert cached_blobs(narrow.blobs) == sorted(blob_files(tmp_path, number) for number in (0, 1))
        assert last_use(blob_files(tmp_path, 0)) < last_use(blob_files(tmp_path, 1))  # so it is the first in turn
        wanted = narrow.excess()
        assert wanted > 0
        assert evict(narrow) >= wanted
        files = CacheFiles.attach(blob_files(tmp_path, 0))
        assert files is not None
        with closing(files):
            assert files.cached_units() == files.units


def test_an_eviction_that_fails_is_not_tried_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(eviction, "_REST_S", 600.0)
    (tmp_path / "blobs").touch()  # in the place of a folder
    full = EvictingSpace(tmp_path, quota=QUOTA)
    for _ in range(2):
        full.start_eviction(UNIT)
        assert full.wait_for_eviction(60)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "eviction failed: [Errno 17]" in caplog.text


def test_what_is_being_read_stays_and_what_comes_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "SWEEP_PAUSE_S", 1.0)  # this reader must come by in between
    cache = small_cache(tmp_path)
    with open_blob(cache, 0) as one, open_blob(cache, 1) as two, open_blob(cache, 2) as three:
        for number, blob in enumerate((one, two)):
            blob.read_at(0, SIZE)
            assert blob.statistics()["requests"] == 1
            assert blob.read_at(0, SIZE) == CONTENTS[number]
        for _ in range(60):
            offset = 20 * UNIT * (_ % 3)
            three.read_at(offset, 20 * UNIT)
            for number, blob in enumerate((one, two)):
                blob._units.tick_at = 0  # a second later
                assert blob.read_at(0, SIZE) == CONTENTS[number]
            time.sleep(0.01)
            assert du(tmp_path) <= QUOTA + _EXTENTS
        assert cache.space.wait_for_eviction(60)
        assert [blob.statistics()["requests"] for blob in (one, two)] == [1, 1]
        assert three.statistics()["uncached_bytes"] > 0


def test_readers_of_evicted_units_ask_again(tmp_path: Path) -> None:
    generator = random.Random(3)
    with open_blob(small_cache(tmp_path, 0), 0) as blob:
        for _ in range(50):
            offset = generator.randrange(SIZE)
            length = min(generator.randrange(10 * UNIT), SIZE - offset)
            assert blob.read_at(offset, length) == CONTENTS[0][offset : offset + length]
            take_back(tmp_path, generator.randrange(1, 20 * UNIT))
        assert blob.statistics()["corrupt_units"] == 0


def test_a_blob_larger_than_the_cache(tmp_path: Path) -> None:
    quota = SIZE // 2
    with open_blob(small_cache(tmp_path, quota), 0) as blob:
        for _ in range(2):
            for offset in range(0, SIZE, 5000):
                length = min(5000, SIZE - offset)
                assert blob.read_at(offset, length) == CONTENTS[0][offset : offset + length]
                assert du(tmp_path) <= quota


def test_a_quota_smaller_than_anything(tmp_path: Path) -> None:
    with small_cache(tmp_path, 4096).open(Counted(0), DIGESTS[0]) as blob:
        assert blob.read_at(0, SIZE) == CONTENTS[0]
    with small_cache(tmp_path, 70 << 10).open(Counted(0), DIGESTS[0]) as blob:
        assert blob.read_at(0, SIZE) == CONTENTS[0]  # does not fit in one piece
        assert blob.read_at(0, 10) == CONTENTS[0][:10]
        assert du(tmp_path) <= 70 << 10


@pytest.mark.kernel
def test_free_space_is_kept(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "quota-test", tmp_path], check=True)
    try:
        cache = BlockCache(tmp_path, min_free=1 << 30, unit=UNIT, readahead_max=0)  # a 16th: 256 KiB
        with ExitStack() as opened:
            blobs = [opened.enter_context(open_blob(cache, number)) for number in range(BLOBS)]
            for blob in blobs:
                blob.read_at(0, SIZE)
            (tmp_path / "other").write_bytes(bytes(1000 << 10))
            for number, blob in enumerate(blobs):
                assert blob.read_at(0, SIZE) == CONTENTS[number]
                blob.evict(0, UNIT)
                blob.read_at(0, UNIT)
                assert cache.space.wait_for_eviction(60)
                status = os.statvfs(tmp_path)
                assert status.f_bavail * status.f_frsize >= 256 << 10
            with suppress_full(tmp_path / "more"):  # nothing left for the cache: reads go on
                for number, blob in enumerate(blobs):
                    assert blob.read_at(0, SIZE) == CONTENTS[number]
            assert cache.space.wait_for_eviction(60)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@contextmanager
def suppress_full(path: Path) -> Iterator[None]:
    """Fill the disk by one file."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        yield


# -- accounting ------------------------------------------------------------------------------------------------------


def used(directory: Path) -> int:
    with CacheSpace(directory)._locked(5) as ledger:
        return ledger.used


def test_what_is_held_is_known(tmp_path: Path) -> None:
    cache = small_cache(tmp_path)
    for number in range(5):
        fill(cache, number)
        assert cache.space.wait_for_eviction(60)
        assert used(tmp_path) == du(tmp_path)


def used_now(directory: Path) -> int:
    """Return the ledger's sum while its lock is held."""
    content: tuple[bytes, bytes, int] = space._LEDGER.unpack((directory / "usage").read_bytes())
    return content[2]


def ledger(boot: bytes, amount: int, magic: bytes = b"OBDLUSED") -> bytes:
    return space._LEDGER.pack(magic, boot, amount)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"short",
        ledger(space._boot_id(), -1),
        ledger(space._boot_id(), 4096, b"OBDLUSEC"),
        ledger(space._boot_id(), 4096, b"OBDLUSEE"),
        ledger(b"!before every other boot", 4096),
        ledger(b"~after every other boot", 4096),
    ],
    ids=["empty", "short", "negative", "magic below", "magic above", "boot below", "boot above"],
)
def test_counted_again_after_a_reboot_or_damage(tmp_path: Path, damage: bytes) -> None:
    fill(small_cache(tmp_path), 0)
    (tmp_path / "usage").write_bytes(damage)
    assert used(tmp_path) == du(tmp_path)


@pytest.mark.parametrize("amount", [0, 4096])
def test_not_counted_again_before_a_reboot(tmp_path: Path, amount: int) -> None:
    fill(small_cache(tmp_path), 0)
    (tmp_path / "usage").write_bytes(ledger(space._boot_id(), amount))
    assert used(tmp_path) == amount


def test_a_ledger_is_never_below_0(tmp_path: Path) -> None:
    fill(small_cache(tmp_path), 0)
    (tmp_path / "usage").write_bytes(ledger(space._boot_id(), 4096))
    assert clear(CacheSpace(tmp_path)) >= SIZE
    assert used(tmp_path) == 0


def test_what_is_held_and_what_comes_count_together(tmp_path: Path) -> None:
    fill(small_cache(tmp_path), 0)
    with (blob_files(tmp_path, 0) / "sums").open("rb") as sums:
        for held, fits in ((512 << 10, False), (128 << 10, True)):
            (tmp_path / "usage").write_bytes(ledger(space._boot_id(), held))
            refused = nullcontext() if fits else pytest.raises(space.CacheFullError)
            with refused, CacheSpace(tmp_path, quota=QUOTA).room(sums.fileno(), (512 << 10) - PAGE):
                assert used_now(tmp_path) == held + (512 << 10)


def test_missing_folders_above_the_cache_are_made(tmp_path: Path) -> None:
    directory = tmp_path / "var" / "lib" / "cache"
    fill(small_cache(directory), 0)
    with open_blob(small_cache(directory), 0) as blob:
        assert blob.read_at(0, SIZE) == CONTENTS[0]
        assert blob.statistics()["requests"] == 0


def test_a_cache_deleted_by_hand(tmp_path: Path) -> None:
    with open_blob(small_cache(tmp_path), 0) as blob:
        blob.read_at(0, 10 * UNIT)
        subprocess.run(["rm", "-rf", tmp_path / "usage", tmp_path / "blobs"], check=True)
        assert blob.read_at(0, SIZE) == CONTENTS[0]
        assert blob.statistics()["uncached_bytes"] > 0  # nobody could give that space back
        with open_blob(small_cache(tmp_path), 0) as other:
            assert other.read_at(0, SIZE) == CONTENTS[0]
    assert used(tmp_path) <= du(tmp_path) <= QUOTA


def test_others_that_hold_the_lock_cost_only_the_caching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "_WAIT_TO_STORE_S", 0.05)
    monkeypatch.setattr(space, "_WAIT_TO_OPEN_S", 0.05)
    with open_blob(small_cache(tmp_path), 0) as blob:
        with locked(tmp_path):
            assert blob.read_at(0, UNIT) == CONTENTS[0][:UNIT]
            assert blob.statistics()["uncached_bytes"] == UNIT
            with small_cache(tmp_path).open(Counted(1), DIGESTS[1]) as bare:
                assert bare.read_at(5, 5) == CONTENTS[1][5:10]
        blob.read_at(0, UNIT)
        assert blob.statistics()["uncached_bytes"] == UNIT


# -- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_evicting(tmp_path: Path, rounds: int) -> None:
    generator = random.Random(9)
    with ExitStack() as opened:
        cache = small_cache(tmp_path)
        blobs = [opened.enter_context(open_blob(cache, number)) for number in range(4)]
        for seed in range(rounds):
            workers = [churn.start(tmp_path, 2 * seed + number, quota=QUOTA, seconds=60) for number in range(2)]
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
            end = time.monotonic() + generator.uniform(0, 0.3)
            while time.monotonic() < end:
                number = generator.randrange(4)
                offset = generator.randrange(SIZE - 100)
                assert blobs[number].read_at(offset, 100) == CONTENTS[number][offset : offset + 100]
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.communicate(timeout=30)
            assert du(tmp_path) <= QUOTA + 20 * UNIT
            for number, blob in enumerate(blobs):
                assert blob.read_at(0, SIZE) == CONTENTS[number]
    take_back(tmp_path)  # nothing is left that could not be given back
    assert list((tmp_path / "blobs").iterdir()) == []


def test_units_dropped_by_a_killed_process_are_not_used_once_their_space_is_gone(tmp_path: Path) -> None:
    with open_blob(small_cache(tmp_path, 0), 0) as blob:
        blob.read_at(0, SIZE)
        files = CacheFiles.attach(blob_files(tmp_path, 0))
        assert files is not None
        with closing(files):
            with (blob_files(tmp_path, 0) / "sums").open("r+b") as sums:
                sums.seek(HEADER_SIZE + 4 * 3 * (UNIT // PAGE))
                sums.write(bytes(4))  # killed right here
            assert blob.read_at(0, SIZE) == CONTENTS[0]
            files.sweep(UNIT)
            files.sweep(UNIT)
            assert files.present(0, 5) == [False, True, True, False, True]
            assert os.pread(files.fd, UNIT, 3 * UNIT) == bytes(UNIT)
            assert blob.read_at(0, SIZE) == CONTENTS[0]


# -- whose word is taken ---------------------------------------------------------------------------------------------


def test_blobs_are_not_shared_between_registries(tmp_path: Path) -> None:
    wrong = MemoryBlob(bytes(SIZE), "hostile")
    with BlockCache(tmp_path, registry="evil.example").open(wrong, DIGESTS[0]) as blob:
        blob.read_at(0, SIZE)
    with BlockCache(tmp_path, registry="good.example:5000").open(Counted(0), DIGESTS[0]) as blob:
        assert blob.read_at(0, SIZE) == CONTENTS[0]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-", "a\0", "x" * 256, "ü"])
def test_what_is_no_registry_becomes_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="registry"):
        BlockCache(tmp_path, registry=name)
