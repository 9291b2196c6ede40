"""pytest: ``--shard NAME`` selects the slow tests of a shard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.shards import table

if TYPE_CHECKING:
    from collections.abc import Sequence

#: All collected slow tests, by id, and the files of all collected tests; before any selection.
SLOW = pytest.StashKey[list[str]]()
FILES = pytest.StashKey[set[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="NAME", help="only the slow tests of this shard (tests/shards/table.py)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[SLOW] = [item.nodeid for item in items if is_slow(item)]
    config.stash[FILES] = {item.path for item in items}
    _check_fixtures(items)
    name = config.getoption("shard")
    if not name:
        return
    try:
        table.named(name)
    except ValueError as error:
        raise pytest.UsageError(f"--shard: {error}") from error
    others = [item for item in items if not _is_in(item, name)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if _is_in(item, name)]


# A slow test whose fixture has moved away would be noticed only in its shard: the ordinary run collects it, too.
def _check_fixtures(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            known = {"request", *item._fixtureinfo.name2fixturedefs}
            absent = sorted(set(item.fixturenames) - known)
            if absent:
                names = ", ".join(absent)
                raise pytest.UsageError(f"{item.nodeid}: fixtures that its directory does not have: {names}")


def _is_in(item: pytest.Item, name: str) -> bool:
    return is_slow(item) and table.beginning_of(item.nodeid)[0] == name


def is_slow(item: pytest.Item) -> bool:
    """Return True if the test runs in a shard only."""
    return item.get_closest_marker("slow") is not None


def problems(nodeids: Sequence[str]) -> list[str]:
    """Return what is wrong with the shards, given all slow tests: one line each."""
    used = {table.beginning_of(nodeid) for nodeid in nodeids}
    lines = [f"{nodeid}: in no shard" for nodeid in nodeids if table.beginning_of(nodeid) == ("", "")]
    lines += [f"{shard.name}: no test" for shard in table.SHARDS if shard.name not in {name for name, _ in used}]
    known = [each for shard in table.SHARDS for each in shard.tests]
    lines += [f"{each}: twice" for each in sorted({each for each in known if known.count(each) > 1})]
    # A directory may be without slow tests for now; a test that is named must be there.
    lines += [f"{each}: no such test" for each in known if "::" in each and each not in {begin for _, begin in used}]
    return lines
