"""Whole builds as an experiment, at their smallest: by obdlab, and by docker where that is installed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obdlab.lab.kinds import KINDS
from obdlab.lab.kinds.kind import SpecError
from obdlab.lab.paper import running
from obdlab.lab.paper.questions import LAZY_BUILD
from obdlab.lab.paper.results import Results
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.spec import Spec
from obdlab.lab.testbed.process import LabError
from obdlab.system import mount
from tests import capabilities


def spec_of(*builders: str, **options: Any) -> Spec:
    small = {"base_mb": 30, "base_layers": 2, "file_kib": 64, "scale": 1.0}
    return Spec.from_values(
        {
            "name": "small",
            "kind": "lazy_build",
            "repeats": 1,
            "load_limit": 1000.0,
            "axes": {"new": ["2x1"], "builder": list(builders)},
            "options": small | options,
        }
    )


def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str) -> dict[str, Any]:
    monkeypatch.setattr("obdlab.lab.run.measuring.code_digest", lambda kind: "same")
    paths = LabPaths(work=tmp_path / "work")
    experiment = Experiment(spec_of(builder), tmp_path / "results", paths)
    assert experiment.run() == 1
    (row,) = experiment.rows()
    assert row.get("error") is None
    for metric in KINDS["lazy_build"].metrics:
        assert row[metric.key] > 0, metric.key
    assert row["total_s"] == pytest.approx(row["pull_s"] + row["build_s"] + row["push_s"])
    assert row["pushed_mb"] == pytest.approx(1.0, rel=0.2)  # half of two megabytes is zeros
    assert not list(paths.work.iterdir())
    assert not [each for each in mount.mounts() if each.mountpoint.is_relative_to(tmp_path)]
    return row


@pytest.mark.kernel
@pytest.mark.registry
@pytest.mark.tools("runc")
@pytest.mark.slow
def test_obdlab_builds_on_a_part_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(tmp_path, monkeypatch, "obdlab")
    assert row["base_share"] < 0.3  # of a small base, metadata is much
    assert row["commit_s"] > 0


@pytest.mark.registry
@pytest.mark.slow
def test_docker_pulls_all_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities.require("docker")
    row = measured(tmp_path, monkeypatch, "docker")
    assert row["base_share"] == pytest.approx(1.0)


def test_without_docker_the_kind_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name.startswith("docker") else found(name))
    needed = KINDS["lazy_build"].needed_programs
    assert "docker" not in needed({"builder": ("obdlab",)})
    spec = spec_of("docker", "obdlab")
    with pytest.raises(LabError, match=r"not installed: .*dockerd .apt-get install docker.io .*packet filters"):
        Experiment(spec, tmp_path / "results", LabPaths(work=tmp_path / "work")).run()
    # An evaluation tells the reason, and has not failed.
    said: list[str] = []
    planned = {LAZY_BUILD.name: replace(spec, name=LAZY_BUILD.name)}
    results = Results(tmp_path / "evaluation")
    assert running.run_all(planned, results, said.append, LabPaths(work=tmp_path / "work")) == {}
    assert "packet filters" in results.why_not(LAZY_BUILD)
    assert "could not be run" in said[-1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"axes": {"builder": ["kaniko"]}}, "axes.builder: unknown"),
        ({"axes": {"new": ["400"]}}, "axes.new: wanted COUNTxMEGABYTES"),
        ({"axes": {"new": ["0x4"]}}, "axes.new: wanted COUNTxMEGABYTES"),
        ({"axes": {"new": ["999x4"]}}, "at most 100 layers"),
        ({"options": {"scale": 0.0}}, "options.scale: wanted a positive number"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        Spec.from_values({"name": "x", "kind": "lazy_build", "repeats": 1, **changes})
