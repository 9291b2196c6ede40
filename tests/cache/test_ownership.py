"""A cache directory in which other users may have left something."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from obdlab.cache.admin import clear
from obdlab.cache.layout import HEADER_SIZE, unit_sums
from obdlab.cache.space import CacheSpace
from obdlab.cache.unpacked import FlatFileError, FlatFiles
from tests.cache.origin import DATA, DIGEST, UNIT, Origin, open_cached


def read_all(directory: Path, origin: Origin) -> bytes:
    blob = open_cached(directory, origin)
    data = blob.read_at(0, len(DATA))
    blob.close()
    return data


def test_no_link_is_followed_to_the_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious" * 100)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    (cache / "usage").symlink_to(victim)
    assert read_all(cache, Origin()) == DATA
    assert victim.read_bytes() == b"precious" * 100
    assert "not cached for now" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_nothing_is_read_from_and_written_to_a_directory_that_others_can_write(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_all(tmp_path / "cache", Origin()) == DATA
    # What another user would leave there: other content, with sums that fit.
    files = tmp_path / "cache/blobs/local" / DIGEST
    wrong = bytes(len(DATA))
    (files / "data").write_bytes(wrong)
    with (files / "sums").open("r+b") as sums:
        sums.seek(HEADER_SIZE)
        for begin in range(0, len(wrong), UNIT):
            sums.write(unit_sums(wrong[begin : begin + UNIT]))
    before = (files / "sums").read_bytes(), (tmp_path / "cache/usage").read_bytes()
    (tmp_path / "cache").chmod(mode)
    assert read_all(tmp_path / "cache", Origin()) == DATA
    assert "can be changed by other users" in caplog.text
    assert before == ((files / "sums").read_bytes(), (tmp_path / "cache/usage").read_bytes())
    with pytest.raises(FlatFileError, match="changed by other users"):
        FlatFiles(CacheSpace(tmp_path / "cache")).open("any")


@pytest.mark.parametrize("name", ["data", "sums"])
@pytest.mark.parametrize("kind", ["link", "pipe", "second name"])
def test_what_is_no_file_of_ours_is_replaced(tmp_path: Path, name: str, kind: str) -> None:
    cache = tmp_path / "cache"
    assert read_all(cache, Origin()) == DATA
    path = cache / "blobs/local" / DIGEST / name
    victim = tmp_path / "victim"
    shutil.move(path, victim)
    before = victim.read_bytes()
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.hardlink_to(victim)
    assert read_all(cache, Origin()) == DATA
    assert victim.read_bytes() == before
    origin = Origin()
    assert read_all(cache, origin) == DATA
    assert not origin.reads, "not cached anew"
    assert clear(CacheSpace(cache)) > 0
