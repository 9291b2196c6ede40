"""How much a miss fetches at once."""

from __future__ import annotations

import pytest

from obdlab.cache.policy import Extent
from obdlab.registry.link import Link

KIB = 1 << 10
MBIT = 125_000


def extent_kib(wait_s: float, rate: float, *, usual: int = 256, most: int = 1024) -> int:
    link = Link()
    link.wait_s, link.bytes_per_wait = wait_s, wait_s * rate
    return Extent(usual // 16, most // 16, 16 * KIB).units(link) * 16


@pytest.mark.parametrize(
    ("wait_s", "mbit", "kib"),
    [
        (0.0018, 100, 64),
        (0.007, 100, 256),
        (0.022, 100, 512),
        (0.0015, 1000, 256),
        (0.007, 1000, 1024),
        (0.022, 1000, 1024),
        (0.150, 10_000, 1024),
        (0.0001, 10, 64),
    ],
)
def test_it_is_a_few_times_what_comes_during_a_wait(wait_s: float, mbit: float, kib: int) -> None:
    assert extent_kib(wait_s, mbit * MBIT) == kib


def test_more_than_the_usual_is_for_those_who_wait() -> None:
    assert extent_kib(0.001, 10_000 * MBIT) == 256


def test_a_link_of_which_nothing_is_known() -> None:
    assert Extent(16, 64, 4096).units(None) == 16
    assert Extent(16, 64, 4096).units(Link()) == 16
    link = Link()
    link.note(0.02, 4096, 0.001)  # too short to tell a rate
    assert Extent(16, 64, 4096).units(link) == 16


def test_how_much_it_has_grown() -> None:
    extent = Extent(16, 64, 16 * KIB)
    assert [extent.growth(units) for units in (4, 16, 32, 64)] == [1, 1, 2, 4]


def test_a_largest_of_none_leaves_it_as_it_is() -> None:
    assert extent_kib(0.022, 1000 * MBIT, most=0) == 256
    assert extent_kib(0.0001, 10 * MBIT, most=0) == 256


@pytest.mark.parametrize("usual", [16, 32])
def test_it_is_never_less_than_a_unit(usual: int) -> None:
    assert extent_kib(0.0001, 10 * MBIT, usual=usual) == 16
