from __future__ import annotations

from math import inf, nextafter
from typing import Any

import pytest

from obdlab.lab.run.rows import Row
from obdlab.lab.run.statistics import (
    Estimate,
    cliffs_delta,
    median_interval,
    outliers,
    ratio_interval,
    shift_interval,
)
from obdlab.lab.run.summary import WIDTH, caveats, findings, headlines, noise_floor, summarise, text_table, wrapped


def test_a_constant_has_no_width() -> None:
    estimate = median_interval([2.0] * 5)
    assert (estimate.median, estimate.low, estimate.high, estimate.count) == (2.0, 2.0, 2.0, 5)


def test_the_same_samples_give_the_same_intervals_for_ever() -> None:
    # Published verdicts rest on these ends.
    above = [1.0, 1.83, 2.681, 1.533, 2.425, 1.318, 2.251, 3.205, 2.16, 3.155, 2.151, 3.187]
    below = [2.0, 3.625, 3.025, 2.425, 4.05, 3.45, 2.85, 2.25, 3.875, 3.275]
    for found, median, low, high, count in (
        # The third smallest of 12 and the third largest: 12 tosses give at most two heads in 2 % of cases.
        (median_interval(above), 2.2055, 1.533, 3.155, 12),
        (median_interval([float(i * 37 % 101) ** 2 for i in range(40)]), 2354.5, 1089.0, 4489.0, 40),
        (ratio_interval(above, below), 0.70015873015873, 0.5241943638789, 0.9454279714566, 10),
        (shift_interval(above, below), -0.8565, -1.532, -0.12, 10),
    ):
        assert (found.median, found.low, found.high) == pytest.approx((median, low, high), rel=1e-9)
        assert found.count == count


@pytest.mark.parametrize(("count", "text"), [(0, "2.5"), (1, "2.5"), (2, "2.5 [2, 3]"), (6, "2.5 [2, 3]")])
def test_an_interval_needs_two_samples(count: int, text: str) -> None:
    estimate = Estimate(2.5, 2.0, 3.0, count)
    assert estimate.has_interval == ("[" in text)
    assert str(estimate) == text


def test_far_out_is_more_than_three_interquartile_ranges_away() -> None:
    # The quartiles are 1 and 3: the fences are -5 and 9, and a sample on a fence is within.
    inner = [0.0, 1.0, 1.0, 2.0, 3.0, 3.0, 4.0]
    assert outliers([-5.0, *inner, 9.0]) == []
    assert outliers([nextafter(-5.0, -inf), *inner, 9.0]) == [0]
    assert outliers([-5.0, *inner, nextafter(9.0, inf)]) == [8]
    assert outliers([9.5, *inner, -5.5]) == [0, 8]


def test_ratio_of_scaled_samples() -> None:
    base = [1.0, 1.1, 0.9, 1.05, 0.95]
    estimate = ratio_interval([2 * value for value in base], base)
    assert estimate.median == pytest.approx(2.0)
    assert estimate.low < 2.0 < estimate.high


def test_a_shift_is_told_in_the_samples_unit() -> None:
    base = [4.0, 4.4, 3.9, 4.1, 4.2]
    estimate = shift_interval([value - 3 for value in base], base)
    assert estimate.median == pytest.approx(-3.0)
    assert estimate.low < -3.0 < estimate.high < 0
    # By hand: the differences are 1-2, 1-5, 3-2, 3-5, 10-2, 10-5.
    assert shift_interval([1.0, 3.0, 10.0], [2.0, 5.0]).median == pytest.approx((-1 + 1) / 2)


def test_how_far_two_samples_overlap() -> None:
    assert cliffs_delta([1.0, 2.0], [3.0, 4.0]) == -1.0
    assert cliffs_delta([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert cliffs_delta([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0.0
    assert cliffs_delta([1.0, 4.0], [2.0, 2.0, 3.0, 5.0]) == pytest.approx((0 + 3 - 4 - 1) / 8)


def test_wild_samples_are_found_and_kept() -> None:
    assert outliers([1.0, 1.1, 0.9, 1.05, 9.0]) == [4]
    assert outliers([1.0, 1.1, 9.0]) == []
    rows = [_row("overlayfs", "cold", t) for t in (1.0, 1.1, 0.9, 1.05, 9.0)]
    assert summarise(rows)[0].total_s.count == 5
    assert "1 of 5 starts are far out" in caveats(rows)[-1]


@pytest.mark.parametrize("samples", [[], [float("nan")], [1.0, float("inf")]])
def test_no_samples_is_an_error(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite"):
        median_interval(samples)


def _row(arm: str, start: str, total_s: float, **more: Any) -> Row:
    row = {"image": "redis", "rate_mbit": 100.0, "rtt_ms": 5.0, "arm": arm, "start": start, "total_s": total_s}
    phases = {"pull_s": total_s / 2, "create_s": 0.0, "start_s": 0.0, "ready_s": total_s / 2}
    return {**row, **phases, "bytes_received": 1e6, "requests": 3, **more}


def test_summary_compares_each_arm_with_the_baseline_and_leaves_failures_out() -> None:
    rows = [_row("overlayfs", "cold", t) for t in (4.0, 4.2, 3.8)]
    rows += [_row("overlayfs (A/A)", "cold", t) for t in (4.1, 4.1, 4.4)]
    rows += [_row("obdlab", "cold", t) for t in (1.0, 1.1, 0.9)]
    rows += [_row("obdlab", "cold", 99.0, error="probe timed out")]
    summaries = summarise(rows)
    assert [summary.arm for summary in summaries] == ["overlayfs", "obdlab", "overlayfs (A/A)"]
    assert summaries[0].ratio is None
    assert summaries[1].ratio is not None
    assert summaries[1].ratio.median == pytest.approx(0.25)
    assert noise_floor(summaries) == pytest.approx(0.025)
    table = text_table(summaries)
    assert "0.25 [" in table
    assert summaries[1].delta == -1.0
    assert summaries[1].shift_s is not None
    assert summaries[1].shift_s.median == pytest.approx(-3.0)
    assert all(len(line) <= WIDTH for line in table.splitlines())
    assert "  3  0.25 [" in table


def test_one_sample_has_no_interval() -> None:
    one = median_interval([4.26])
    assert not one.has_interval
    assert str(one) == "4.26"
    assert one.text(".1f") == "4.3"
    ratio = ratio_interval([1.0, 2.0, 3.0], [4.0])
    assert (ratio.low, ratio.high, str(ratio)) == (0.5, 0.5, "0.5")
    assert not shift_interval([1.0], [2.0, 3.0]).has_interval
    summaries = summarise([_row("overlayfs", "cold", 4.26), _row("obdlab", "cold", 1.0)])
    assert "[" not in text_table(summaries).partition("ratio")[2]
    assert "too few to be sure" in headlines(summaries)[0]


def test_a_headline_says_how_much_sooner_the_best_arm_starts() -> None:
    rows = [
        _row("overlayfs", start, t) for start, t in (("cold", 4.7), ("warm", 0.11)) for t in (t, t + 0.01, t + 0.02)
    ]
    rows += [_row("obdlab", "cold", t) for t in (1.7, 1.8, 1.9)]
    rows += [_row("obdlab-hot", start, t) for start, t in (("cold", 0.8), ("warm", 0.13)) for t in (t, t, t)]
    (headline,) = headlines(summarise(rows))
    assert headline == (
        "redis starts in 0.8 s instead of 4.7 s (obdlab with a hot layer, recorded, against a full pull with "
        "overlayfs; cold, 100 Mbit/s, 5 ms). Warm: 0.13 s against 0.12 s."
    )
    assert all(len(line) <= WIDTH for line in wrapped([headline]))
    (headline,) = headlines(
        summarise([_row(arm, "cold", t) for arm in ("overlayfs", "obdlab") for t in (1.0, 1.1, 1.2)])
    )
    assert "no sooner than the noise" in headline


def test_nothing_to_summarise_is_said() -> None:
    with pytest.raises(ValueError, match="no good row"):
        summarise([_row("obdlab", "cold", 1.0, error="x")])


def test_a_difference_within_the_noise_is_none() -> None:
    rows = [_row("overlayfs", "cold", t) for t in (1.0, 1.01, 0.99, 1.0)]
    rows += [_row("overlayfs (A/A)", "cold", t) for t in (0.8, 0.81, 0.79, 0.8)]
    rows += [_row("obdlab", "cold", t) for t in (0.9, 0.91, 0.89, 0.9)]
    (sentence,) = findings(summarise(rows))
    assert "no different (within the noise)" in sentence
    (sentence,) = findings(summarise([row for row in rows if "A/A" not in row["arm"]]))
    assert "faster than overlayfs" in sentence


def test_one_start_tells_nothing() -> None:
    (sentence,) = findings(summarise([_row("overlayfs", "cold", 4.0), _row("obdlab", "cold", 1.0)]))
    assert "too few starts" in sentence


def test_busy_hosts_and_failures_are_told() -> None:
    rows = [
        _row("obdlab", "cold", 1.0, quiet=quiet, load_1m=6.3, load_limit=1.5, repeat=0) for quiet in (True, False)
    ]
    rows.append(_row("obdlab", "cold", 1.0, error="no answer", repeat=3))
    failed, busy = caveats(rows)
    assert "#4 failed when cold: no answer" in failed
    assert "1 of 2 starts began on a busy host (load up to 6.3" in busy


def test_changed_settings_are_told() -> None:
    rows = [_row("obdlab", "cold", 1.0, settings={"cache_extent_max": 0}), _row("overlayfs", "cold", 1.0)]
    assert caveats(rows) == ['With obdlab\'s settings changed: {"cache_extent_max": 0}.']
