"""The whole path on real parts: registry behind a shaped link, containerd, snapshotter, device, rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.lab.bench import LabPaths
from obdlab.lab.experiment import Experiment
from obdlab.lab.spec import Spec
from obdlab.lab.summary import findings, summarise

SPEC = Spec("tiny", images=("tiny",), repeats=1, warm_starts=1, rtts_ms=(2.0,), load_limit=1000.0)


@pytest.fixture
def paths(tmp_path: Path) -> LabPaths:
    return LabPaths(
        datasets=(Path(__file__).parents[2] / "datasets",), images=tmp_path / "images", work=tmp_path / "work"
    )


@pytest.mark.containerd
def test_a_cold_and_a_warm_start_of_every_arm(tmp_path: Path, paths: LabPaths) -> None:
    experiment = Experiment(SPEC, tmp_path / "results", paths)
    assert experiment.run() == 3
    rows = experiment.rows()
    assert [row.get("error") for row in rows] == [None] * 6
    by_arm = {(row["arm"], row["start"]): row for row in rows}
    plain, lazy = by_arm["overlayfs", "cold"], by_arm["obdlab", "cold"]
    # Cold is proved: nothing was there, and everything that was needed came from the registry.
    assert set(lazy["evidence"].values()) == {0}
    assert plain["bytes_received"] > 4_000_000
    assert 0 < lazy["bytes_received"] < plain["bytes_received"]
    assert plain["requests"] >= 7
    assert lazy["link_bytes"] > lazy["bytes_received"]
    for arm in SPEC.arms:
        warm = by_arm[arm, "warm"]
        assert warm["requests"] == 0
        assert warm["evidence"]["resident_bytes"] > 0
        assert warm["pull_s"] == 0.0
    for row in rows:
        assert row["total_s"] == pytest.approx(row["pull_s"] + row["create_s"] + row["start_s"] + row["ready_s"])
    assert len(findings(summarise(rows))) == 2
    assert (tmp_path / "results" / "rows.csv").read_text().count("\n") == 7
    environment = experiment.environments()[0]
    assert environment["network"]["rtt_ms"] == 2.0
    assert json.loads((tmp_path / "results" / "spec.json").read_text())["seed"] == SPEC.seed
    # What is measured is not measured again.
    assert Experiment(SPEC, tmp_path / "results", paths).run() == 0


@pytest.mark.containerd
def test_a_start_that_is_never_ready_is_a_row_with_its_error(tmp_path: Path, paths: LabPaths) -> None:
    spec = SPEC.with_values(ready_timeout_s=0.001, snapshotters=["obdlab"], a_a=False)
    experiment = Experiment(spec, tmp_path / "results", paths)
    experiment.run()
    (row,) = experiment.rows()
    assert "ready" in row["error"]
    assert row["start"] == "cold"
    # It is not taken for measured.
    assert experiment.run() == 1


def test_a_misspelt_key_on_the_command_line_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("repeats = 1\n")
    assert main(["experiment", "run", str(tmp_path / "x.toml"), "--set", "repeat=2"]) == 1
    assert "unknown key" in capsys.readouterr().err
    assert main(["experiment", "run", str(tmp_path / "x.toml"), "--set", "repeats"]) == 1
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["experiment", "run", str(tmp_path / "absent.toml")]) == 1
    assert "absent.toml" in capsys.readouterr().err


def test_nothing_measured_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["experiment", "list", "--results", str(tmp_path)]) == 0
    assert "nothing measured yet" in capsys.readouterr().out
