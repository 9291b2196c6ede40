"""The page that says when each shard passed last (``docs/develop/long-tests.md``)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.shards import table

PAGE = Path(__file__).parents[2] / "docs" / "develop" / "long-tests.md"
_NEVER = "never"
_HEAD = "| shard | covers | passed | commit | minutes |\n|---|---|---|---|---|\n"
_ROW = re.compile(
    r"^\| `(?P<name>[^`]+)` \|[^|]*\| (?P<passed>[^|]*) \| (?P<commit>[^|]*) \| (?P<minutes>[^|]*) \|$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Pass:
    """The last time that all tests of a shard passed: a date as in ISO 8601, '' if they never did."""

    passed: str = ""
    commit: str = ""
    minutes: str = ""


def passes(text: str) -> dict[str, Pass]:
    """Return what a page says, by shard; shards that it does not name never passed."""
    found = {
        row["name"]: Pass("" if row["passed"] == _NEVER else row["passed"], row["commit"], row["minutes"])
        for row in _ROW.finditer(text)
    }
    return {shard.name: found.get(shard.name, Pass()) for shard in table.SHARDS}


def oldest(text: str) -> str:
    """Return the shard whose last pass is longest ago."""
    known = passes(text)
    return min(known, key=lambda name: known[name].passed)


def with_pass(text: str, name: str, last: Pass) -> str:
    """Return the page with a shard's last pass, and rows for exactly the shards there are. Raises ValueError."""
    begin = text.find(_HEAD)
    if begin < 0:
        raise ValueError(f"{PAGE.name}: table is missing (wanted the line {_HEAD.splitlines()[0]!r})")
    end = begin + len(_HEAD)
    while text.startswith("| `", end):
        end = text.index("\n", end) + 1
    known = passes(text) | {table.named(name).name: last}
    rows = "".join(_row(shard, known[shard.name]) for shard in table.SHARDS)
    return text[:begin] + _HEAD + rows + text[end:]


def _row(shard: table.Shard, last: Pass) -> str:
    return f"| `{shard.name}` | {shard.covers} | {last.passed or _NEVER} | {last.commit} | {last.minutes} |\n"
