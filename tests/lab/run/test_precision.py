"""How many repeats a precision needs, and when a run ends early."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from obdlab.cli.main import main
from obdlab.lab.run.pairs import always_valid
from obdlab.lab.run.precision import PilotError, Stopping, needs
from obdlab.lab.run.rows import Row, RowStore
from obdlab.lab.run.spec import Cell, Spec, SpecError
from obdlab.lab.run.starts import StartReport
from obdlab.lab.run.student import quantile
from tests.lab.declared import declared
from tests.lab.run.test_statistics import _row

SPEC = declared(snapshotters=["overlayfs", "obdlab", "stargz"], repeats=10, precision=0.1)


def _cell(arm: str, repeat: int, **more: Any) -> Cell:
    point = {"image": "redis", "arm": arm, "rate_mbit": 100.0, "rtt_ms": 5.0, "disk": "native"}
    return Cell({**point, **more}, repeat)


def _cold(arm: str, total_s: float, repeat: int = 0) -> Row:
    return _row(arm, "cold", total_s, repeat=repeat, disk="native", recipe="redis")


def _stopping(spec: Spec, **totals: list[float]) -> Stopping:
    stopping = Stopping(spec)
    for arm, values in totals.items():
        for repeat, total_s in enumerate(values):
            stopping.add(_cell(arm, repeat), [_cold(arm, total_s), _row(arm, "warm", 99.0)])
    return stopping


def test_an_arm_that_is_surely_different_is_not_measured_again() -> None:
    base = [4.0, 4.04, 3.98]
    stopping = _stopping(SPEC, overlayfs=base, obdlab=[1.0, 1.01, 0.99], stargz=[4.0, 3.0, 5.0])
    assert stopping.is_enough(_cell("obdlab", 3))
    # Its first three repeats are measured in any case, as is an arm that is still open, with the baseline for it.
    assert not stopping.is_enough(_cell("obdlab", 2))
    for arm in ("stargz", "overlayfs", "overlayfs (A/A)"):
        assert not stopping.is_enough(_cell(arm, 3)), arm
    # Another place is open.
    assert not stopping.is_enough(_cell("obdlab", 3, rate_mbit=1000.0))
    stopping = _stopping(SPEC, overlayfs=base, obdlab=[1.0, 1.01, 0.99], stargz=[8.0, 8.1, 7.9])
    assert all(stopping.is_enough(_cell(arm, 3)) for arm in ("stargz", "overlayfs", "overlayfs (A/A)"))


def test_no_difference_above_the_precision_is_a_decision_too() -> None:
    near = [4.001, 4.041, 3.981]
    totals = {"overlayfs": [4.0, 4.04, 3.98], "obdlab": near, "stargz": near}
    assert _stopping(SPEC, **totals).is_enough(_cell("obdlab", 3))
    wide = {**totals, "obdlab": [4.0, 4.6, 3.5]}
    assert not _stopping(SPEC, **wide).is_enough(_cell("obdlab", 3))
    assert not _stopping(SPEC.with_values(precision=0.0), **totals).is_enough(_cell("obdlab", 3))


def test_a_decision_does_not_look_ahead() -> None:
    totals = {"overlayfs": [4.0, 4.0, 4.0, 4.01, 4.0], "obdlab": [4.0, 3.0, 5.0, 1.0, 1.0], "stargz": [1.0] * 5}
    stopping = _stopping(SPEC, **totals)
    assert not stopping.is_enough(_cell("obdlab", 3))
    assert stopping.is_enough(_cell("stargz", 3))


def test_failed_starts_are_no_pairs() -> None:
    stopping = _stopping(SPEC, overlayfs=[4.0, 4.04, 3.98])
    for repeat in range(3):
        stopping.add(_cell("obdlab", repeat), [{**_cold("obdlab", 1.0), "error": "no answer"}])
    assert not stopping.is_enough(_cell("obdlab", 3))


def test_arms_that_a_run_stopped_for_are_sure_in_the_report() -> None:
    arms = ("obdlab", "stargz", "soci", "erofs")
    spec = declared(
        snapshotters=["overlayfs", *arms], a_a=False, repeats=20, precision=0.01, warm_starts=1, dropped_starts=1
    )
    stopping, rows = Stopping(spec), list[Row]()
    for cell in spec.cells():
        if stopping.is_enough(cell):
            continue
        # All arms need the same number of pairs. Warm and dropped starts are the baseline's, and tested all the same.
        noise = 0.1 * (-1) ** cell.repeat
        arm = str(cell.point["arm"])
        found = [_cold(arm, 1.0 if arm == "overlayfs" else math.exp(noise - 0.2), cell.repeat)]
        found += [_row(arm, start, 0.5, repeat=cell.repeat, disk="native") for start in ("warm", "dropped")]
        stopping.add(cell, found)
        rows += found
    assert {len([row for row in rows if row["arm"] == arm]) for arm in arms} == {3 * 11}
    cold = [line for line in StartReport().facts(spec, rows)["findings"] if ", cold, " in line]
    assert len(cold) == len(arms)
    assert [line for line in cold if "faster than" not in line] == []


def test_the_report_judges_by_the_intervals_that_the_run_stopped_on() -> None:
    rows = [
        _cold(arm, total_s + 0.01 * repeat * (-1) ** repeat, repeat)
        for arm, total_s in (("overlayfs", 4.0), ("obdlab", 1.0))
        for repeat in range(3)
    ]
    spec = declared(repeats=10, precision=0.1, a_a=False)
    ((point, ratio),) = always_valid(spec, rows)
    assert point["arm"] == "obdlab"
    (summary,) = [each for each in StartReport().facts(spec, rows)["summaries"] if each["arm"] == "obdlab"]
    assert (summary["ratio"]["low"], summary["ratio"]["high"]) == (ratio.low, ratio.high)
    plain = StartReport().facts(spec.with_values(precision=0.0), rows)["summaries"]
    (other,) = [each for each in plain if each["arm"] == "obdlab"]
    assert other["ratio"]["low"] > ratio.low
    assert any("faster than" in line for line in StartReport().facts(spec, rows)["findings"])


def test_the_repeats_that_a_precision_needs() -> None:
    pilot = [_cold("overlayfs", math.exp(value)) for value in (-0.1, 0.0, 0.1)]
    pilot += [_cold("obdlab", 0.25 * math.exp(value)) for value in (-0.1, 0.0, 0.1)]
    pilot += [_row("obdlab", "warm", 9.0, disk="native"), _cold("stargz", 1.0)]
    (need,) = needs(SPEC, pilot, 0.2)
    assert (need.arm, need.pilot) == ("obdlab", 3)
    assert need.ratio == pytest.approx(0.25)
    # The spread of either arm is 0.1, and may be twice as large with a chance of one in five.
    for repeats, is_enough in ((need.repeats, True), (need.repeats - 1, False)):
        deviation = math.sqrt(2 * 0.01 * 2 / 0.446)
        reach = quantile(0.95, 2.0 * (repeats - 1)) * deviation / math.sqrt(repeats)
        assert (reach <= math.log(1.2)) is is_enough
    assert needs(SPEC, pilot, 0.1)[0].repeats > 3 * need.repeats
    # A difference so large is sure after a few pairs.
    assert 3 <= need.stopped < 6
    assert "obdlab: ×0.25 in 3 pairs of the pilot" in need.line()


def test_a_pilot_that_says_nothing_is_refused() -> None:
    with pytest.raises(PilotError, match="no comparison"):
        needs(SPEC, [_cold("obdlab", 1.0)], 0.1)
    for precision in (0.0, 1.0, -0.1):
        with pytest.raises(PilotError, match="between 0 and 1"):
            needs(SPEC, [], precision)
    with pytest.raises(SpecError, match="precision"):
        declared(precision=-0.1)


def test_the_plan_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    pilot = Path(__file__).parents[3] / "experiments" / "measured" / "hot"
    words = ["lab", "plan", "peers.toml", "--pilot", str(pilot), "--precision", "0.1"]
    words += ["--set", 'snapshotters=["overlayfs", "obdlab-hot", "stargz"]']
    assert main([*words, "--set", 'images=["pydata"]']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 4 + 1
    assert lines[0].startswith("pydata, 100.0, 0.0, native: obdlab-hot: ×0.21 in 3 pairs")
    assert "repeats are enough for all" in lines[-1]
    assert main([*words, "--set", 'images=["pydata"]', "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["pilot"] == 3


@pytest.mark.kernel
def test_a_run_ends_early_and_is_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lab", "run", "index.toml", "--set", "axes.layers=[1]", "--set", "axes.segments=[1000, 100000]"]
    words += [
        "--set",
        "repeats=12",
        "--set",
        "precision=9.0",
        "--set",
        "load_limit=1000.0",
        "--results",
        str(tmp_path),
    ]
    assert main(words) == 0
    rows = RowStore(tmp_path / "index").rows()
    assert 6 <= len(rows) < 24
    assert {row["repeat"] for row in rows} >= {0, 1, 2}
    assert main(words) == 0
    assert len(RowStore(tmp_path / "index").rows()) == len(rows)
    assert "everything was measured already" in "".join(capsys.readouterr())
