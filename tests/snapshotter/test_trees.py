"""Walks over directories that a container made, however deep."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from obdlab.snapshotter import trees


def nested(top: Path, depth: int) -> None:
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):  # step by step: as a path it would be too long
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


# Of this process, which may close what other tests have left at any time.
def opened_below(top: Path) -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            count += os.readlink(f"/proc/self/fd/{name}").startswith(str(top))
    return count


@pytest.mark.parametrize(("depth", "wanted"), [(3, 4), (100, 101), (101, 102), (102, 102), (2500, 102)])
def test_counting_ends_a_hundred_directories_deep(tmp_path: Path, depth: int, wanted: int) -> None:
    top = tmp_path / "top"
    top.mkdir()
    nested(top, depth)
    opened = [opened_below(top) for _ in trees.statuses(top)]
    assert len(opened) == wanted
    assert max(opened) <= 2 * 102  # each open directory, and its list of entries
    trees.delete_tree(top)
    assert not top.exists()
    assert opened_below(top) == 0
