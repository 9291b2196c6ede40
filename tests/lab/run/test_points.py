"""Experiments of every kind: declared, measured for real at their smallest, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from obdlab.cli.main import main
from obdlab.lab.kinds import KINDS
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.declaration import last_spec, load
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.spec import Spec, SpecError
from obdlab.lab.run.table import points_table

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
SMALL: dict[str, dict[str, Any]] = {
    "index": {"axes": {"segments": [100], "layers": [1, 4]}},
    "codec": {"axes": {"block_size": [4096]}, "options": {"image": "tiny", "size_mib": 2}},
    "fio": {
        "axes": {"iodepth": [1]},
        "options": {"image": "tiny", "size_mib": 2, "seconds": 0.2},
    },
    "forms": {"axes": {"work": ["read"], "disk": ["native"]}, "options": {"image": "tiny", "reads": 10}},
    "build": {"options": {"files": 20, "mean_kib": 8}},
}


@pytest.fixture(autouse=True)
def _code_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    # Somebody may be editing it while this runs: then nothing would count as measured.
    monkeypatch.setattr("obdlab.lab.run.measuring.code_digest", lambda kind: "same")


@pytest.fixture
def paths(tmp_path: Path) -> LabPaths:
    datasets = (Path(__file__).parents[3] / "datasets",)
    return LabPaths(datasets=datasets, images=tmp_path / "images", work=tmp_path / "work")


@pytest.mark.parametrize("kind", list(SMALL))
@pytest.mark.kernel
def test_every_kind_measures_its_points(kind: str, tmp_path: Path, paths: LabPaths) -> None:
    values = {"name": kind, "kind": kind, "repeats": 1, "load_limit": 1000.0, **SMALL[kind]}
    spec = Spec.from_values(values)
    experiment = Experiment(spec, tmp_path / "results", paths)
    assert experiment.run() == len(spec.points())
    rows = experiment.rows()
    assert [row.get("error") for row in rows] == [None] * len(rows)
    for row in rows:
        for metric in KINDS[kind].metrics:
            assert row[metric.key] > 0, metric.key
    assert experiment.run() == 0
    assert list(experiment.progress().values()) == [(len(rows), len(rows))]
    assert not list(paths.work.iterdir())
    head, *lines = (line for line in experiment.report() if not line.startswith("Image tiny is sha256:"))
    assert KINDS[kind].metrics[0].key in head
    assert len(lines) == len(rows)
    assert last_spec(tmp_path / "results") == spec


def test_declarations_of_this_collection_are_sound() -> None:
    found = sorted(EXPERIMENTS.glob("*.toml"))
    assert {load(path).name for path in found} >= {"quick", "cold_warm", "peers", "codec", "index", "fio", "build"}
    for path in found:
        if "[quick]" in path.read_text():
            assert load(path, quick=True) != load(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('kind = "juggling"', "kind: unknown"),
        ('kind = "index"\nrepeat = 3', "unknown key"),
        ('kind = "index"\n[axes]\nsectors = [1]', "axes: unknown key"),
        ('kind = "index"\n[axes]\nsegments = []', "axes.segments: wanted a list of at least one value"),
        ('kind = "index"\n[axes]\nsegments = ["many"]', "axes.segments: wanted int"),
        ('kind = "codec"\n[options]\nsize_mib = "2"', "options.size_mib: wanted int"),
        ('kind = "codec"\naxes = 3', "axes: wanted a table"),
        ('kind = "codec"\nrepeats = 0', "repeats: wanted at least 1 .got 0"),
        ('kind = "codec"\nrepeats = "x"', "repeats: wanted int .got 'x'"),
        ('kind = "index"\n[axes]\nsegments = [[1]]', "axes.segments: wanted int"),
        ('kind = "index"\n[axes]\nsegments = [1, 1]', "axes.segments: wanted each value once"),
        ('kind = "codec"\nimages = ["tiny"]', "unknown key .got 'images'"),
        ('kind = ["codec"]', "kind: unknown"),
    ],
)
def test_bad_declarations_say_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=complaint) as caught:
        load(path)
    assert "x.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "declares no experiment .got no key, wanted a kind, or a key of container starts, such as images"),
        ("# images = ['redis']\n", "declares no experiment .got no key"),
        ('name = "mine"\ndescription = "x"\n', "declares no experiment .got description"),
        ("[quick]\nrepeats = 1\n", "declares no experiment .got no key"),
        ('[project]\nname = "mine"\n', "unknown key .got 'project', wanted among a_a, "),
    ],
)
@pytest.mark.parametrize("quick", [False, True])
def test_a_file_that_declares_nothing_starts_nothing(tmp_path: Path, text: str, complaint: str, quick: bool) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=f"x.toml: {complaint}"):
        load(path, quick=quick)


def test_a_declaration_without_a_quick_table_has_no_quick_mode(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("repeats = 3\n")
    with pytest.raises(SpecError, match="quick: no such table"):
        load(path, quick=True)
    path.write_text('repeats = 3\n[quick]\nrepeats = 1\nimages = ["tiny"]\n')
    spec = load(path, quick=True)
    assert (spec.repeats, spec.images()) == (1, ["tiny"])


def test_the_first_axis_is_compared_with_its_first_value() -> None:
    spec = Spec.from_values({"name": "x", "kind": "fio", "repeats": 3, "axes": {"iodepth": [1]}})
    rows = []
    for device, iops in (("loop", 100.0), ("obdlab-raw", 50.0), ("obdlab-lz4", 25.0), ("obdlab-zstd", 200.0)):
        numbers = {metric.key: iops for metric in KINDS["fio"].metrics}
        rows += [{"device": device, "iodepth": 1, "rw": "randread", "bs": 8192, **numbers}] * 3
    _, loop, raw, lz4, zstd = points_table(spec, rows)
    assert loop.split()[3] == "loop"
    assert "0.50 [" in raw
    assert "0.25 [" in lz4
    assert "2.00 [" in zstd
    assert zstd.endswith("+1.00")


def test_points_are_measured_in_another_order_each_time_and_changed_by_name() -> None:
    spec = Spec.from_values({"name": "x", "kind": "index", "repeats": 4})
    size = len(spec.points())
    blocks = [spec.cells()[start : start + size] for start in range(0, 4 * size, size)]
    assert len({json.dumps([cell.point for cell in block]) for block in blocks}) > 1
    changed = spec.with_values(**{"axes.layers": [2]})
    assert changed.axes["layers"] == (2,)
    assert changed.axes["segments"] == spec.axes["segments"]
    with pytest.raises(SpecError, match="options: unknown key"):
        spec.with_values(**{"options.colour": 1})


def test_the_baseline_measured_twice_is_an_arm_of_its_own() -> None:
    spec = Spec.from_values({"name": "x", "kind": "misses", "a_a": True, "repeats": 2, "axes": {"size": [4096]}})
    labels = ["0", "5", "20", "0 (A/A)"]
    assert [str(arm) for arm in spec.arms] == labels
    assert {str(cell.point["rtt_ms"]) for cell in spec.cells()} == set(labels)
    # What is measured for it is the baseline; its rows are of another cell.
    by_arm = {str(cell.point["rtt_ms"]): cell for cell in spec.cells() if cell.repeat == 0}
    assert spec.measured_point(by_arm["0 (A/A)"]) == {"rtt_ms": 0, "size": 4096}
    assert spec.key(by_arm["0 (A/A)"], "here") != spec.key(by_arm["0"], "here")
    numbers = {metric.key: 2.0 for metric in KINDS["misses"].metrics}
    rows = [{**spec.columns(cell), **numbers} for cell in spec.cells()]
    *_, again = points_table(spec, rows)
    assert again.split()[1:3] == ["0", "(A/A)"]
    assert "1.00 [" in again


def test_a_spec_survives_its_declaration_with_all_that_is_changed() -> None:
    for kind, given in SMALL.items():
        spec = Spec.from_values({"name": kind, "kind": kind, "a_a": True, "repeats": 3, **given})
        assert Spec.from_values(json.loads(json.dumps(spec.declaration()))) == spec
    starts = Spec.from_values({"name": "x", "images": ["tiny"], "axes": {"disk": ["cloud"]}, "warm_starts": 0})
    assert starts.declaration()["disks"] == ["cloud"]
    assert Spec.from_values(starts.declaration()) == starts
    with pytest.raises(SpecError, match="kind: cannot be changed"):
        starts.with_values(kind="index")


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
def test_any_kind_has_a_report_and_goes_on_as_it_was_declared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, paths: LabPaths
) -> None:
    monkeypatch.setattr("obdlab.lab.paths.LabPaths", lambda **options: paths)
    (tmp_path / "x.toml").write_text('kind = "index"\nrepeats = 1\nload_limit = 1000\n[axes]\nsegments = [100]\n')
    words = ["--set", "axes.layers=[1, 4]", "--set", "a_a=true", "--results", str(tmp_path)]
    assert main(["lab", "run", str(tmp_path / "x.toml"), *words, "--report"]) == 0
    page = (tmp_path / "x" / "report.html").read_text()
    assert "100 (A/A)" in page
    assert page.count("image/png") + page.count("<img") >= 1
    store = Experiment(last_spec(tmp_path / "x"), tmp_path / "x").store
    kept = store.path.read_text().splitlines(keepends=True)
    assert len(kept) == 4
    # A run that lost its last row, and tore the line before it.
    store.path.write_text("".join(kept[:2]) + kept[2][:40])
    capsys.readouterr()
    assert main(["lab", "resume", "x", "--results", str(tmp_path)]) == 0
    assert "the last line was torn" in capsys.readouterr().err
    assert len(store.rows()) == 4
    assert main(["lab", "status", str(tmp_path / "x.toml"), *words]) == 0
    assert "index: 4 of 4 cells measured" in capsys.readouterr().out
