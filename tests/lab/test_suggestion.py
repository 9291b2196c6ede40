"""The kind that compares suggested traces with recorded ones: its values, and a start recorded for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from obdlab.lab.kinds import KINDS
from obdlab.lab.kinds.suggestion import MODEL
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.declaration import load
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.spec import Spec, SpecError
from obdlab.lab.workbench import folder
from obdlab.traces.profile import own_profile

SMALL = {"repeats": 1, "quiet_wait_s": 0, "load_limit": 1000.0}


def spec(**values: Any) -> Spec:
    return Spec.from_values({"name": "suggestion", "kind": "suggestion", **SMALL, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"axes": {"trace": ["guessed"]}}, "axes.trace: unknown"),
        ({"axes": {"rate_mbit": [0]}}, "axes.rate_mbit: wanted positive"),
        ({"options": {"rtt_ms": -1.0}}, "not negative"),
    ],
)
def test_a_declaration_is_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        spec(**values)


def test_the_declaration_has_sixteen_images_and_each_is_left_out_of_its_profile() -> None:
    declared = load(folder("experiments") / "suggestion.toml")
    images = {str(point["image"]) for point in declared.points()}
    assert len(images) >= 16
    profile = own_profile()
    # A profile without one of them would not be one of all others.
    assert images == set(profile.examples)
    assert not any(_is_used(image) for image in images)
    assert {row["model"] for row in (declared.columns(cell) for cell in declared.cells())} == {MODEL}


# The numbers of the examples stay, so that a name remains without any file.
def _is_used(image: str) -> bool:
    profile = own_profile().without(image)
    number = profile.examples.index(image)
    return any(
        number in (*file.contained, *file.followed, *(each.example for each in file.reads)) for file in profile.files
    )


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.containerd
def test_a_start_is_recorded_and_compared(tmp_path: Path) -> None:
    datasets = (Path(__file__).parents[2] / "datasets",)
    paths = LabPaths(datasets=datasets, images=tmp_path / "images", work=tmp_path / "work")
    kept = tmp_path / "kept"
    axes = {"image": ["tiny"], "trace": ["learned", "rules", "again"], "rate_mbit": [100]}
    experiment = Experiment(spec(axes=axes, options={"recordings": str(kept)}), tmp_path / "results", paths)
    assert experiment.run() == 3
    rows = {row["trace"]: row for row in experiment.rows()}
    assert [row.get("error") for row in rows.values()] == [None] * 3
    assert {row["model"] for row in rows.values()} == {MODEL}
    assert rows["again"]["kept"] > 0.5
    assert 0 < rows["rules"]["covered"] <= 1
    assert rows["rules"]["recorded_mb"] == rows["again"]["recorded_mb"] > 0
    assert len(list(kept.glob("tiny-*.trace"))) == 2
    assert not list(paths.work.iterdir())
    # Another run takes the same recordings, and its numbers are the same.
    again = Experiment(spec(axes=axes, options={"recordings": str(kept)}), tmp_path / "others", paths)
    again.run()
    numbers = [metric.key for metric in KINDS["suggestion"].metrics]
    for row in again.rows():
        assert [row[key] for key in numbers] == [rows[row["trace"]][key] for key in numbers]
