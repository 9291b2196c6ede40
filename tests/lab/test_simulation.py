"""The kind of simulated experiments: its values, its seeds, its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from obdlab.lab.kinds import KINDS
from obdlab.lab.kinds.kind import Job
from obdlab.lab.kinds.simulation import LABEL
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.declaration import load
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.plan import plan_run
from obdlab.lab.run.spec import Spec, SpecError
from obdlab.lab.testbed.process import LabError
from obdlab.lab.workbench import folder

SMALL = {"axes": {"hosts": [5]}, "repeats": 2, "quiet_wait_s": 0, "load_limit": 1000.0}


def spec(**values: Any) -> Spec:
    return Spec.from_values({"name": "sim", "kind": "simulation", **SMALL, **values})


def numbers(tmp_path: Path, given: Spec) -> dict[str, dict[str, Any]]:
    """Return the numbers of each cell, but the time that computing took."""
    job = Job(given.axes, given.options, {}, {}, LabPaths(), tmp_path, print)
    with KINDS["simulation"].open(job) as bench:
        found = {}
        for cell in given.cells():
            (row,) = bench.measure(given.measured_point(cell))
            del row["computed_s"]
            found[f"{cell.point['topology']} {cell.point['hosts']} {cell.repeat}"] = row
        return found


def test_the_seed_is_the_repeat(tmp_path: Path) -> None:
    found = numbers(tmp_path, spec())
    assert found == numbers(tmp_path, spec())
    assert found["rooted 5 0"] != found["rooted 5 1"]
    assert found["direct 5 0"]["copies"] == 5
    assert found["rooted 5 0"]["copies"] == 1
    # A cell keeps its numbers when others are added or done before.
    more = numbers(tmp_path, spec(axes={"hosts": [7, 5]}, repeats=3))
    assert {key: more[key] for key in found} == found


def test_a_row_says_that_it_is_simulated_and_a_measured_one_does_not() -> None:
    simulated, measured = spec(), Spec.from_values({"name": "i", "kind": "index"})
    assert all(simulated.columns(cell)["label"] == LABEL for cell in simulated.cells())
    assert all("label" not in measured.columns(cell) for cell in measured.cells())
    assert "repeat" not in measured.measured_point(measured.cells()[0])


def test_shapes_and_caches(tmp_path: Path) -> None:
    axes = {"topology": ["balanced"], "hosts": [40], "shape": ["synthetic"]}
    (row,) = numbers(tmp_path, spec(axes=axes, repeats=1, options={"run_s": 0.2})).values()
    assert row["median_s"] >= 0.2
    assert row["recovered_s"] > 0
    axes = {"topology": ["rooted"], "hosts": [5], "caches": ["warm"]}
    (row,) = numbers(tmp_path, spec(axes=axes, repeats=1)).values()
    assert row["origin_mb"] == row["peer_mb"] == 0


def test_hosts_leave_and_older_rows_keep_their_cells(tmp_path: Path) -> None:
    given = spec(axes={"topology": ["balanced"], "hosts": [40]}, repeats=1, options={"leave_share": 0.3})
    (row,) = numbers(tmp_path, given).values()
    assert (row["left"], row["moved_per_leave"] > 0) == (12, True)
    assert 28 <= row["containers_started"] <= 40
    assert row["peak_sent_mb_s"] > row["peak_received_mb_s"] > 0
    identity = KINDS["simulation"].identity(spec().options, {})
    assert not {"leave_share", "patience_s"} & set(identity["options"])
    assert KINDS["simulation"].identity(given.options, {})["options"]["leave_share"] == 0.3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"axes": {"topology": ["ring"]}}, "axes.topology: unknown"),
        ({"axes": {"caches": ["hot"]}}, "axes.caches: unknown"),
        ({"axes": {"hosts": [0]}}, "axes.hosts: wanted positive"),
        ({"options": {"up_mbit": -1.0}}, "up_mbit"),
        ({"options": {"rtt_ms": -1.0}}, "no negative value"),
        ({"options": {"leave_share": 1.0}}, "leave_share: wanted a share below 1"),
        ({"axes": {"shape": ["iot"]}, "options": {"leave_share": 0.1}}, "leave_share: hosts leave only"),
    ],
)
def test_a_declaration_is_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        spec(**values)


def test_a_missing_timeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"nowhere\.json"):
        numbers(tmp_path, spec(options={"timeline": "nowhere.json"}))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(LabError, match="not that of a start"):
        numbers(tmp_path, spec(options={"timeline": str(tmp_path / "other.json")}))


@pytest.mark.parametrize("path", sorted(folder("experiments").glob("simulated_*.toml")), ids=lambda path: path.stem)
def test_declarations_say_that_they_are_simulated_and_have_a_quick_mode(path: Path) -> None:
    whole, quick = load(path), load(path, quick=True)
    assert whole.description.startswith("Simulated: ")
    assert len(quick.cells()) < len(whole.cells())
    paths = LabPaths()
    assert plan_run(quick, quick.cells(), paths).seconds < 600


@pytest.mark.kernel
def test_the_engine_runs_and_resumes_it(tmp_path: Path) -> None:
    experiment = Experiment(spec(), tmp_path / "sim")
    assert experiment.run() == 4
    assert experiment.run() == 0
    rows = experiment.rows()
    assert {row["label"] for row in rows} == {LABEL}
    assert any("rooted" in line for line in experiment.report())
