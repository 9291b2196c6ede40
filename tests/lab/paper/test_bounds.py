"""The table of bounds needs nothing but the rows in the repository."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.bounds import lines

MEASURED = Path(__file__).parents[3] / "experiments" / "measured"


def test_the_bounds_of_the_published_starts() -> None:
    for name, count in (("peers", 28), ("hot", 19)):
        head, *table = lines(MEASURED / name)
        assert len(table) >= count, name
        column = head.index("of it")
        shares = [float(line[column - 1 : column + 5].split()[-1]) for line in table]
        # No start is faster than its bound.
        assert all(0.95 < share < 10 for share in shares), name
