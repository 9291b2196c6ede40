"""The bytes of a day, shared by all users of a cache."""

from __future__ import annotations

import math
from pathlib import Path

from obdlab.cache.ahead.allowance import Allowance
from obdlab.cache.space import CacheSpace, disk_usage

MIB = 1 << 20


class Clock:
    now = 20_000 * 86_400.0

    def __call__(self) -> float:
        return self.now


def test_no_limit_touches_no_file(tmp_path: Path) -> None:
    allowance = Allowance(CacheSpace(tmp_path / "cache"), 0)
    assert allowance.left(5) == math.inf
    allowance.spend(5)
    allowance.give_back()
    assert not (tmp_path / "cache").exists()


def test_users_share_a_day(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (Allowance(CacheSpace(tmp_path), 20 * MIB, clock) for _ in range(2))
    assert first.left(MIB) == 16 * MIB
    assert second.left(MIB) == 4 * MIB
    first.spend(10 * MIB)
    first.give_back()
    assert second.left(8 * MIB) == 10 * MIB
    second.spend(10 * MIB)
    assert second.left(MIB) == 0
    assert first.left(1) == 0
    assert CacheSpace(tmp_path).count() == disk_usage(tmp_path)


def test_a_new_day_begins_anew(tmp_path: Path) -> None:
    clock = Clock()
    allowance = Allowance(CacheSpace(tmp_path), MIB, clock)
    assert allowance.left(1) == MIB
    allowance.spend(MIB)
    clock.now += 86_399
    assert allowance.left(1) == 0
    clock.now += 1
    assert allowance.left(1) == MIB
    clock.now += 86_400
    allowance.give_back()  # of a day that is over
    assert Allowance(CacheSpace(tmp_path), MIB, clock).left(1) == MIB


def test_a_damaged_file_is_that_of_another_day(tmp_path: Path) -> None:
    Allowance(CacheSpace(tmp_path), MIB, Clock()).left(MIB)
    path = tmp_path / "allowance" / "today"
    for content in (b"", b"x" * 24, path.read_bytes()[:-1]):
        path.write_bytes(content)
        assert Allowance(CacheSpace(tmp_path), MIB, Clock()).left(MIB) == MIB


def test_without_access_nothing_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "allowance").write_text("a file")
    assert Allowance(CacheSpace(tmp_path), MIB, Clock()).left(1) == 0
