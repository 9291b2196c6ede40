"""Numbers in others' texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.formats.decimal import MAX_SIZE, decimal

NONE = ["", "00", "01", "0" * 20 + "1", "+1", "-1", " 1", "1 ", "1\n", "1_0", "1e3", "0x1", "1.0", "٣", "²", "9" * 20]


@pytest.mark.parametrize("text", [*NONE, "9" * 10_000_000, "0" * 10_000_000])
def test_what_is_no_number(text: str) -> None:
    assert decimal(text) is None


@given(st.integers(0, MAX_SIZE * 4))
def test_numbers(value: int) -> None:
    assert decimal(str(value)) == (value if value <= MAX_SIZE else None)
    assert decimal(str(value), value) == value
    assert decimal(str(value + 1), value) is None
