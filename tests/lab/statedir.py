"""The fixture ``state_dir``, for every test that starts the testbed's networks and daemons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """Where this test's networks and daemons note what they are."""
    directory = tmp_path / "state"
    yield directory
    left = [path.name for path in directory.glob("*")]
    assert not left, f"left behind in the state directory: {left}"
