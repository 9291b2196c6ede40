"""The space that is left to others: a limit, or a share of a small disk."""

from __future__ import annotations

import pytest

from obdlab.system.keptfree import kept_free

GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "wanted", "kept"), [(100 * GIB, GIB, GIB), (8 * GIB, GIB, GIB // 2), (0, GIB, 0), (GIB, 0, 0)]
)
def test_a_limit_is_at_most_a_sixteenth_of_the_disk(size: int, wanted: int, kept: int) -> None:
    assert kept_free(size, wanted) == kept
