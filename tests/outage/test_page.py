"""docs/explanation/outages.md says what the tests do."""

from __future__ import annotations

import re
from pathlib import Path

from tests.outage.cases import CASES, SITUATIONS, table
from tests.outage.situations import MAKING

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "outages.md").read_text()


def test_the_table_is_the_one_of_the_tests() -> None:
    between = PAGE.partition("<!-- python -m tests.outage.cases -->\n")[2].partition("<!-- end -->")[0]
    assert between == table()


def test_every_row_is_tested() -> None:
    assert all(case.fault is not None for case in CASES)
    assert [case.name for case in SITUATIONS] == list(MAKING)
    assert len({case.name for case in [*CASES, *SITUATIONS]}) == len(CASES) + len(SITUATIONS)


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) >= 5
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text()
