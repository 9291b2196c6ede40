"""Every slow test is in exactly one shard, and the page follows what passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.shards import page, plugin, table
from tests.shards.page import Pass

_ROOT = Path(__file__).parents[2]


# Of this run if it has collected all tests, which takes long; else of a run that does nothing else.
def _all_slow_tests(config: pytest.Config) -> list[str]:
    if set((_ROOT / "tests").rglob("test_*.py")) <= config.stash[plugin.FILES]:
        return config.stash[plugin.SLOW]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def test_every_slow_test_is_in_one_shard(request: pytest.FixtureRequest) -> None:
    slow = _all_slow_tests(request.config)
    assert len(slow) > 200
    assert plugin.problems(slow) == []


def test_what_is_wrong_with_shards_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = (
        table.Shard("a", "", ("x", "y/t.py::one", "y/t.py::two")),
        table.Shard("b", "", ("x",)),
        table.Shard("c", "", ("z",)),
    )
    monkeypatch.setattr(table, "SHARDS", shards)
    assert plugin.problems(["tests/x/t.py::a", "tests/y/t.py::one[1]", "tests/w/t.py::b"]) == [
        "tests/w/t.py::b: in no shard",
        "c: no test",
        "x: twice",
        "y/t.py::two: no such test",
    ]


def test_the_longest_beginning_decides() -> None:
    assert table.beginning_of("tests/devices/test_fuse_loop.py::t")[0] == "devices"
    assert table.beginning_of("tests/devices/test_torture.py::test_much[append-False-7]")[0] == "torture"
    rounds = "tests/server/test_kinds.py::test_many_rounds_leave_nothing"
    assert table.beginning_of(f"{rounds}[ublk-1]")[0] == "vm-rounds-2"
    assert table.beginning_of(f"{rounds}[tcmu-0]")[0] == "vm-rounds-5"
    assert table.beginning_of("tests/nowhere/t.py::t") == ("", "")


def test_the_page_names_every_shard() -> None:
    text = page.PAGE.read_text()
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == [shard.name for shard in table.SHARDS]


def test_a_pass_is_noted_and_the_oldest_comes_next() -> None:
    text = page.PAGE.read_text() + "after the table\n"
    for number, shard in enumerate(reversed(table.SHARDS)):
        text = page.with_pass(text, shard.name, Pass(f"2100-01-01 00:{number:02}", "abc1234", str(number)))
    assert page.oldest(text) == table.SHARDS[-1].name
    again = page.with_pass(text, page.oldest(text), Pass("2100-01-02 00:00", "def5678", "7"))
    assert page.oldest(again) == table.SHARDS[-2].name
    assert page.passes(again)[table.SHARDS[-1].name] == Pass("2100-01-02 00:00", "def5678", "7")
    assert again.endswith("after the table\n")
    assert again.count("| `") == len(table.SHARDS)


def test_a_shard_that_never_passed_comes_first() -> None:
    some = table.SHARDS[:3]
    text = page.PAGE.read_text()
    for shard in table.SHARDS:
        if shard is not some[1]:
            text = page.with_pass(text, shard.name, Pass("2100-01-01 00:00", "abc1234", "1"))
    known = page.passes(text)
    assert page.oldest(text) == min(known, key=lambda name: known[name].passed)
    with pytest.raises(ValueError, match="no such shard"):
        page.with_pass(text, "other", Pass())
    with pytest.raises(ValueError, match="table is missing"):
        page.with_pass("", some[0].name, Pass())


def test_an_unknown_shard_is_refused() -> None:
    command = [sys.executable, "-m", "tests.shards", "run", "other"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such shard (got 'other', wanted one of convert, snapshotter, cache" in done.stderr
