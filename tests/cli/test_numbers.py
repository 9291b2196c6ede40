"""Numbers on the command line."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.cli.numbers import real, whole


@given(st.integers(-5, 1100))
def test_whole_numbers_within_their_bounds(value: int) -> None:
    read = whole(1, 999)
    if 1 <= value <= 999:
        assert read(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=r"wanted a number from 1 to 999 \(got '-?\d+'\)"):
            read(str(value))
    assert whole(0)("0") == 0


@pytest.mark.parametrize("text", ["", "1.5", "+1", " 1", "1_0", "\u0661", "9" * 5000, "x"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="wanted a number of layers of at least 1"):
        whole(1, what="number of layers")(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "x", "", "60"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="wanted a number of at least 0 and less than 60"):
        real(below=60)(text)


def test_numbers_with_a_bound_that_is_left_out() -> None:
    assert real()("0") == 0
    assert real(above=0)("0.25") == 0.25
    with pytest.raises(argparse.ArgumentTypeError, match=r"wanted a number of more than 0 \(got '0'\)"):
        real(above=0)("0")
    with pytest.raises(argparse.ArgumentTypeError):
        real(above=0)("inf")
