"""`obdlab cache`: lists, clears and checks while others read, and tells right from wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.cache.admin import CheckedBlob, blobs_of, check_blob, clear, entries
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.space import CacheSpace
from obdlab.cache.unitfiles import CacheFiles
from obdlab.cli.main import main
from obdlab.formats.oci import digest_of
from tests.cache import churn
from tests.cache.origin import locked
from tests.cache.test_quota import CONTENTS, DIGESTS, SIZE, UNIT, blob_files, du, fill, open_blob, small_cache


def obdlab(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert obdlab(capsys, "cache", "list", "--json", "--cache-dir", missing) == (0, "[]\n")
    assert not missing.exists()
    cache = small_cache(tmp_path)
    fill(cache, 0)
    (blob_files(tmp_path, 2)).mkdir(parents=True)
    (blob_files(tmp_path, 2) / "sums").write_bytes(b"garbage")
    with open_blob(cache, 1) as blob:
        blob.read_at(0, 3 * UNIT)
        _, output = obdlab(capsys, "cache", "list", "--json", "--cache-dir", tmp_path)
        _, table = obdlab(capsys, "cache", "list", "--cache-dir", tmp_path)
    found = {entry["digest"]: entry for entry in json.loads(output)}
    assert found.keys() == set(DIGESTS[:3])
    wanted = {"size": SIZE, "cached_bytes": SIZE, "in_use": False, "verified": False, "registry": "local"}
    assert found[DIGESTS[0]] | wanted == found[DIGESTS[0]]
    assert found[DIGESTS[1]] | wanted | {"in_use": True, "cached_bytes": 3 * UNIT} == found[DIGESTS[1]]
    assert found[DIGESTS[2]]["size"] == 0
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == [e["digest"][:19] for e in json.loads(output)]
    assert "in use" in table
    assert "damaged" in table
    assert table.splitlines()[-1].startswith("3 blobs, ")


def test_clear_some_and_all_while_they_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = small_cache(tmp_path, 0)
    for number in range(3):
        fill(cache, number)
    stop = threading.Event()
    failures: list[int] = []

    def read(blob: CachedBlob) -> None:
        offset = 0
        while not stop.is_set():
            offset = (offset + 77_777) % (SIZE - 9000)
            if blob.read_at(offset, 9000) != CONTENTS[0][offset : offset + 9000]:
                failures.append(offset)

    with open_blob(cache, 0) as blob:
        threads = [threading.Thread(target=read, args=(blob,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        status, output = obdlab(capsys, "cache", "clear", DIGESTS[1], "--json", "--cache-dir", tmp_path)
        assert status == 0
        assert json.loads(output)["freed_bytes"] >= SIZE
        assert not blob_files(tmp_path, 1).exists()
        assert blob_files(tmp_path, 2).exists()
        for _ in range(30):
            assert obdlab(capsys, "cache", "clear", "--cache-dir", tmp_path)[0] == 0
        stop.set()
        for thread in threads:
            thread.join()
        assert blob.statistics()["requests"] > 1
        assert blob.statistics()["corrupt_units"] == 0
    assert failures == []
    assert obdlab(capsys, "cache", "clear", "--cache-dir", tmp_path)[0] == 0
    assert list((tmp_path / "blobs").iterdir()) == []
    assert du(tmp_path) <= 4 * 4096


def test_clear_leaves_an_open_blob_its_files(tmp_path: Path) -> None:
    with open_blob(small_cache(tmp_path, 0), 0) as blob:
        blob.read_at(0, SIZE)
        assert clear(CacheSpace(tmp_path)) >= SIZE
        assert (blob_files(tmp_path, 0) / "data").stat().st_blocks == 0
        for _ in range(2):
            assert blob.read_at(0, SIZE) == CONTENTS[0]
        assert blob.statistics() | {"requests": 2, "uncached_bytes": 0} == blob.statistics()


@pytest.mark.parametrize("repair", [False, True])
def test_files_that_cannot_be_of_a_blob_are_damaged(tmp_path: Path, repair: bool) -> None:
    fill(small_cache(tmp_path, 0), 0)
    (blob_files(tmp_path, 0) / "sums").write_bytes(b"garbage")
    space = CacheSpace(tmp_path)
    found = check_blob(space, blob_files(tmp_path, 0), repair=repair)
    assert found == CheckedBlob("local", DIGESTS[0], 0, (0,), None)
    assert not found.sound
    assert blob_files(tmp_path, 0).exists() is not repair
    assert (clear(space) >= SIZE) is not repair
    assert not blob_files(tmp_path, 0).exists()


def test_verify_finds_flipped_bytes_and_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = small_cache(tmp_path, 0)
    for number in range(2):
        fill(cache, number)
    command = ("cache", "verify", "--json", "--cache-dir", tmp_path)
    status, output = obdlab(capsys, *command)
    assert status == 0
    assert [(blob["checked_bytes"], blob["matches"]) for blob in json.loads(output)] == [(SIZE, True)] * 2
    files = CacheFiles.attach(blob_files(tmp_path, 0))
    assert files is not None
    assert files.header.verified
    files.close()
    for offset in (5 * UNIT + 9, SIZE - 1):
        flip(blob_files(tmp_path, 0) / "data", offset)
    damaged = [5 * UNIT, SIZE // UNIT * UNIT]
    for repair, status in (([], 1), ([], 1), (["--repair"], 0)):
        got, output = obdlab(capsys, *command, *repair)
        assert got == status
        found = {blob["digest"]: blob for blob in json.loads(output)}
        assert found[DIGESTS[0]]["damaged"] == damaged
        assert not found[DIGESTS[0]]["sound"]
        assert found[DIGESTS[1]]["sound"]
    status, output = obdlab(capsys, "cache", "verify", "--cache-dir", tmp_path)
    assert (status, output.splitlines()[-1][:7]) == (0, "2 blobs")
    with open_blob(cache, 0) as blob:
        assert blob.read_at(0, SIZE) == CONTENTS[0]
        assert blob.statistics()["corrupt_units"] == 0
        assert blob.statistics()["demand_bytes"] == UNIT + SIZE % UNIT


def test_verify_finds_a_blob_that_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = MemoryBlob(bytes(SIZE), "wrong")
    cache = BlockCache(tmp_path, unit=UNIT)
    with cache.open(wrong, DIGESTS[3]) as blob:
        blob.read_at(0, SIZE)
        status, output = obdlab(capsys, "cache", "verify", "--cache-dir", tmp_path)
        assert status == 1
        assert "does not match its digest" in output
        assert obdlab(capsys, "cache", "verify", "--repair", "--cache-dir", tmp_path)[0] == 0
    with open_blob(cache, 3) as blob:
        assert blob.read_at(0, SIZE) == CONTENTS[3]
    status, output = obdlab(capsys, "cache", "verify", "--json", "--cache-dir", tmp_path, digest_of(b"other"))
    assert (status, output) == (0, "[]\n")


def test_all_of_it_while_several_processes_store_and_evict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = [churn.start(tmp_path, seed, quota=700 << 10, seconds=4) for seed in range(2)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        rounds = 0
        while any(worker.poll() is None for worker in workers):
            rounds += 1
            status, output = obdlab(capsys, "cache", "list", "--json", "--cache-dir", tmp_path)
            assert status == 0
            assert all(0 <= entry["cached_bytes"] <= entry["size"] for entry in json.loads(output))
            status, output = obdlab(capsys, "cache", "verify", "--json", "--cache-dir", tmp_path)
            assert status == 0
            assert all(blob["sound"] for blob in json.loads(output))
            if rounds % 3 == 0:
                assert obdlab(capsys, "cache", "clear", "--cache-dir", tmp_path)[0] == 0
            assert du(tmp_path) <= 700 << 10
    finally:
        for worker in workers:
            _, errors = worker.communicate(timeout=60)
    assert [worker.returncode for worker in workers] == [0, 0], errors
    assert rounds > 0


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("damage", [True, False])
def test_a_check_waits_for_a_busy_cache(
    tmp_path: Path, damage: bool, repair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obdlab.cache import space

    with BlockCache(tmp_path, unit=UNIT).open(MemoryBlob(bytes(SIZE), "wrong"), DIGESTS[3]) as blob:
        blob.read_at(0, SIZE)
    last = SIZE // UNIT * UNIT
    if damage:
        flip(blob_files(tmp_path, 3) / "data", SIZE - 1)
    monkeypatch.setattr(space, "_WAIT_TO_STORE_S", 0.02)
    monkeypatch.setattr(space, "_WAIT_TO_OPEN_S", 0.02)
    monkeypatch.setattr(space, "_WAIT_TO_EVICT_S", 60.0)
    seen = 0
    with ExitStack() as lock:
        release = threading.Timer(0.3, lock.close)

        def progress(length: int) -> None:
            nonlocal seen
            seen += length
            if seen == last:  # before the last unit
                lock.enter_context(locked(tmp_path))
                release.start()

        found = check_blob(CacheSpace(tmp_path), blob_files(tmp_path, 3), repair=repair, progress=progress)
        release.join()
    assert found is not None
    assert (found.damaged, found.matches) == (((last,), None) if damage else ((), False))
    if repair:
        assert blob_files(tmp_path, 3).exists() is damage


@pytest.mark.parametrize(
    "command", [entries, clear, lambda space: check_blob(space, blobs_of(space)[0], repair=True)]
)
def test_commands_wait_for_a_busy_cache(
    tmp_path: Path, command: Callable[[CacheSpace], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from obdlab.cache import space

    fill(small_cache(tmp_path), 0)
    monkeypatch.setattr(space, "_WAIT_TO_OPEN_S", 0.02)
    monkeypatch.setattr(space, "_WAIT_TO_EVICT_S", 60.0)
    with ExitStack() as lock:
        lock.enter_context(locked(tmp_path))
        release = threading.Timer(0.3, lock.close)
        release.start()
        assert command(CacheSpace(tmp_path))
        release.join()


def test_what_is_no_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "../..", "--cache-dir", str(tmp_path)]) == 1
    assert "digest" in capsys.readouterr().err


def test_a_lock_held_by_others_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from obdlab.cache import space

    fill(small_cache(tmp_path), 0)
    monkeypatch.setattr(space, "_WAIT_TO_EVICT_S", 0.05)
    with locked(tmp_path):
        assert main(["cache", "list", "--cache-dir", str(tmp_path)]) == 1
    assert "locked by another process" in capsys.readouterr().err
