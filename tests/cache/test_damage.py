"""The block cache: right bytes whatever happened to its files, and to the disk they are on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from obdlab.cache import fetching, space, units
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.unitfiles import CacheFiles
from obdlab.cache.units import CachedUnits
from tests.cache.origin import DATA, DIGEST, UNIT, Origin, locked, open_cached, wait_until


def flip(path: Path, offset: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1 << bit]))


def damage_flip(files: Path, generator: random.Random) -> None:
    flip(files / "data", generator.randrange(len(DATA)), generator.randrange(8))


def damage_cut(files: Path, generator: random.Random) -> None:
    os.truncate(files / "data", generator.randrange(len(DATA)))


def damage_remove_data(files: Path, generator: random.Random) -> None:
    (files / "data").unlink()


def damage_lengthen(files: Path, generator: random.Random) -> None:
    with (files / "data").open("ab") as file:
        file.write(b"more")


def damage_sums(files: Path, generator: random.Random) -> None:
    flip(files / "sums", generator.randrange((files / "sums").stat().st_size), generator.randrange(8))


def damage_cut_sums(files: Path, generator: random.Random) -> None:
    os.truncate(files / "sums", generator.randrange((files / "sums").stat().st_size))


def damage_garble_sums(files: Path, generator: random.Random) -> None:
    (files / "sums").write_bytes(generator.randbytes((files / "sums").stat().st_size))


def damage_remove_sums(files: Path, generator: random.Random) -> None:
    (files / "sums").unlink()


def damage_remove_all(files: Path, generator: random.Random) -> None:
    shutil.rmtree(files)


DAMAGES = [
    damage_flip,
    damage_cut,
    damage_remove_data,
    damage_lengthen,
    damage_sums,
    damage_cut_sums,
    damage_garble_sums,
    damage_remove_sums,
    damage_remove_all,
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("damage", DAMAGES)
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_damaged_under_a_reader_heal(
    tmp_path: Path, damage: Callable[[Path, random.Random], None], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "_RETRY_S", 0.0)
    monkeypatch.setattr(units, "_TICK_S", 0.0)
    generator = random.Random(seed)
    files = tmp_path / "blobs" / "local" / DIGEST
    with open_cached(tmp_path, Origin()) as blob, open_cached(tmp_path, Origin()) as other:
        for _ in range(4):
            assert blob.read_at(0, len(DATA)) == DATA
            damage(files, generator)
            for reader in (blob, other, blob):
                for offset in range(0, len(DATA), 2 * UNIT):
                    length = min(3 * UNIT, len(DATA) - offset)
                    assert reader.read_at(offset, length) == DATA[offset : offset + length]
                reader.evict(generator.randrange(len(DATA)), 1)
        asked = blob.statistics()["requests"]
        assert blob.read_at(0, len(DATA)) == DATA
    with open_cached(tmp_path, Origin()) as blob:  # and it is cached again
        assert blob.read_at(0, len(DATA)) == DATA
        assert blob.statistics()["requests"] + blob.statistics()["corrupt_units"] <= 2, asked


def test_any_byte_of_any_file_may_be_flipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator = random.Random(13)
    with open_cached(tmp_path, Origin()) as blob:
        for _ in range(150):
            assert blob.read_at(0, len(DATA)) == DATA
            path = generator.choice([path for path in sorted(tmp_path.rglob("*")) if path.is_file()])
            flip(path, generator.randrange(path.stat().st_size))
            if generator.random() < 0.3:
                with open_cached(tmp_path, Origin()) as again:
                    assert again.read_at(0, len(DATA)) == DATA
    assert caplog.text.count("failed its checksum") > 10


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_after_a_power_failure(tmp_path: Path, rounds: int) -> None:
    # Nothing is synced, so of what was written any page may be there or not, a file may be short or have holes.
    generator = random.Random(17)
    for _ in range(rounds):
        with open_cached(tmp_path, Origin(), quota=1 << 20) as blob:
            assert blob.read_at(0, len(DATA)) == DATA
        for path in sorted(tmp_path.rglob("*")):
            if not path.is_file():
                continue
            content = bytearray(path.read_bytes())
            for start in range(0, len(content), UNIT):
                if generator.random() < 0.2:
                    content[start : start + UNIT] = bytes(len(content[start : start + UNIT]))
            if generator.random() < 0.2:
                del content[generator.randrange(len(content) + 1) :]
            path.write_bytes(content)


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


def test_a_hit_checks_the_pages_that_are_read_and_no_others(tmp_path: Path) -> None:
    origin = Origin()
    page = 4096
    with open_cached(tmp_path, origin, unit=4 * page) as blob:
        blob.read_at(0, len(DATA))
        flip(tmp_path / "blobs" / "local" / DIGEST / "data", 3 * page + 5)
        for first, stop in [(0, 1), (0, 3), (1, 2), (1, 3), (4, 6), (4, 12), (7, 9)]:
            assert blob.read_at(first * page, (stop - first) * page) == DATA[first * page : stop * page]
        assert blob.statistics() | {"corrupt_units": 0, "requests": 1} == blob.statistics()
        assert blob.read_at(3 * page, 10) == DATA[3 * page : 3 * page + 10]
        assert blob.statistics() | {"corrupt_units": 1, "requests": 2} == blob.statistics()


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


def test_evict_takes_nothing_of_a_verified_blob(tmp_path: Path) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        assert blob.verify()
        blob.evict(0, len(DATA))
        assert blob.verified
        assert blob.statistics()["evicted_units"] == 0
        assert origin.evicted == []
        assert blob.missing_bytes() == 0


@pytest.mark.parametrize("how", ["lost", "of another user"])
def test_evict_does_not_take_any_mark_for_a_proof(tmp_path: Path, how: str) -> None:
    origin = Origin()
    with open_cached(tmp_path, origin) as blob:
        assert blob.read_at(0, len(DATA)) == DATA
        assert blob.verify()
        if how == "lost":
            blob._units.drop(7, 8)
        else:
            blob._files.read_only = True
        blob.evict(0, UNIT)
        assert origin.evicted == [(0, UNIT)]
        assert blob.missing_piece(0) == (0, 1)


def test_evict_replaces_bytes_that_came_wrong(tmp_path: Path) -> None:
    wrong = Origin(bytes(len(DATA)))
    with open_cached(tmp_path, wrong) as blob, open_cached(tmp_path, Origin()) as other:
        assert blob.read_at(0, UNIT) == bytes(UNIT)
        assert other.read_at(0, UNIT) == bytes(UNIT)  # shared, and right as far as the cache can know
        other.evict(0, UNIT)
        assert other.read_at(0, UNIT) == DATA[:UNIT]
        assert blob.read_at(0, UNIT) == DATA[:UNIT]  # it noticed


def test_wrong_bytes_that_are_just_being_stored_are_evicted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing, release = threading.Event(), threading.Event()
    store = CachedUnits.store

    def slowly(units: CachedUnits, first: int, data: bytes) -> bool:
        storing.set()
        assert release.wait(30)
        return store(units, first, data)

    monkeypatch.setattr(CachedUnits, "store", slowly)
    answers = [bytes(4 * UNIT), DATA]
    origin = Origin()
    monkeypatch.setattr(origin, "read_at", lambda offset, length, call=None: answers.pop(0)[:length])
    with open_cached(tmp_path, origin) as blob, ThreadPoolExecutor(2) as threads:
        first = threads.submit(blob.read_at, 0, 4 * UNIT)
        assert storing.wait(30)
        assert blob.read_at(0, UNIT) == bytes(UNIT)  # handed out before it is stored
        evicting = threads.submit(blob.evict, 0, UNIT)
        with pytest.raises(TimeoutError):
            evicting.result(0.2)
        release.set()
        evicting.result(30)
        assert first.result(30) == bytes(4 * UNIT)
        assert blob.read_at(0, UNIT) == DATA[:UNIT]


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
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=0700", "cache-test", tmp_path], check=True)
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


def test_files_opened_to_be_read_only_take_no_part_in_storing(tmp_path: Path) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, 3 * UNIT)
    directory = tmp_path / "blobs" / "local" / DIGEST
    before = (directory / "sums").read_bytes()
    assert CacheFiles.open_read_only(directory, len(DATA) + 1) is None
    files = CacheFiles.open_read_only(directory, len(DATA))
    assert files is not None
    with closing(files):
        assert (files.attached, files.read_only) == (False, True)  # so that caching is tried again later
        assert files.present(0, 4) == [True, True, True, False]
        assert files.load(0, 3) == DATA[: 3 * UNIT]
        files.stamp()
        files.touch(0, 4)
        assert not files.mark_verified(files.header.generation)
        assert files.claim(0, 4) is None
        files.unclaim(0, 4)
    assert (directory / "sums").read_bytes() == before


def test_cache_that_cannot_be_made_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blobs").write_text("a file where a directory should be")
    with BlockCache(tmp_path).open(Origin(), DIGEST) as blob:
        assert blob.read_at(5, 5) == DATA[5:10]
    assert "origin: not cached for now: " in caplog.text


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


@contextmanager
def writable_again(target: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,rw", target], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,ro", target], check=True)


@pytest.mark.kernel
def test_a_read_only_file_system(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "cache-test", tmp_path], check=True)
    try:
        with open_cached(tmp_path, Origin()) as kept:
            kept.read_at(0, 10 * UNIT)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        with open_cached(tmp_path, Origin()) as blob:
            assert blob.read_at(UNIT + 5, 8 * UNIT) == DATA[UNIT + 5 : 9 * UNIT + 5]
            assert blob.statistics()["uncached_bytes"] == 0
            assert blob.read_at(0, len(DATA)) == DATA
            assert blob.statistics()["uncached_bytes"] == len(DATA) - 10 * UNIT
            assert not blob.verify()
            # What fails its checksum above cannot be taken away: nothing there is read any more.
            blob.evict(0, UNIT)
            assert blob.read_at(0, 2 * UNIT) == DATA[: 2 * UNIT]
            assert blob.statistics()["uncached_bytes"] == len(DATA) - 8 * UNIT
        assert "not cached for now, but for what is there" in caplog.text
        with (
            writable_again(tmp_path),
            (tmp_path / "blobs" / "local" / DIGEST / "data").open("r+b") as file,
        ):
            file.write(b"\xff" * 100)
        with open_cached(tmp_path, Origin()) as blob:
            assert blob.read_at(0, 2 * UNIT) == DATA[: 2 * UNIT]
            assert blob.statistics()["corrupt_units"] == 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_files_of_another_owner(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_cached(tmp_path, Origin()) as blob:
        blob.read_at(0, len(DATA))
    for path in sorted(tmp_path.rglob("*")):
        path.chmod(0)
    script = (
        "import os, sys; from tests.cache.origin import *\n"
        "from pathlib import Path\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "blob = open_cached(Path(sys.argv[1]), Origin())\n"
        "assert blob.read_at(0, len(DATA)) == DATA\n"
        "assert blob.statistics()['uncached_bytes'] == len(DATA)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Permission denied" in done.stderr
    with open_cached(tmp_path, Origin()) as blob:  # root is not kept out
        assert blob.read_at(0, len(DATA)) == DATA
        assert blob.statistics()["requests"] == 0


def test_a_lock_held_at_open_delays_the_caching_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_RETRY_S", 0.0)
    monkeypatch.setattr(space, "_WAIT_TO_OPEN_S", 0.05)
    (tmp_path / "usage").touch()
    with locked(tmp_path):
        blob = open_cached(tmp_path, Origin())
        assert blob.read_at(0, 2 * UNIT) == DATA[: 2 * UNIT]
    assert blob.read_at(0, 2 * UNIT) == DATA[: 2 * UNIT]
    blob.close()
    with open_cached(tmp_path, Origin()) as blob:
        assert blob.read_at(0, 2 * UNIT) == DATA[: 2 * UNIT]
        assert blob.statistics()["requests"] == 0
