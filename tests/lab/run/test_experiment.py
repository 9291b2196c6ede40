"""The whole path on real parts: registry behind a shaped link, containerd, snapshotter, device, rows."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.baselines.adapter import check_programs
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.declaration import last_spec
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.rows import RowStore
from obdlab.lab.run.spec import Cell, Spec, SpecError
from obdlab.lab.run.summary import caveats, findings, summarise
from obdlab.lab.testbed.exclusive import only_experiment, only_run
from obdlab.lab.testbed.process import LabError
from tests import capabilities
from tests.lab.declared import declared

QUICK = Path(__file__).parents[3] / "experiments" / "quick.toml"
SPEC = declared("tiny", images=("tiny",), repeats=1, warm_starts=1, rtts_ms=(2.0,), load_limit=1000.0)


@pytest.fixture(autouse=True)
def _code_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    # Somebody may be editing it while this runs: then nothing would count as measured.
    monkeypatch.setattr("obdlab.lab.run.measuring.code_digest", lambda kind: "same")


@pytest.fixture
def paths(tmp_path: Path) -> LabPaths:
    return LabPaths(
        datasets=(Path(__file__).parents[3] / "datasets",), images=tmp_path / "images", work=tmp_path / "work"
    )


@pytest.mark.containerd
def test_a_cold_and_a_warm_start_of_every_arm(tmp_path: Path, paths: LabPaths) -> None:
    spec = SPEC.with_values(settings={"user_agent": "experiment/7"})
    experiment = Experiment(spec, tmp_path / "results", paths)
    assert experiment.run() == 3
    rows = experiment.rows()
    assert [row.get("error") for row in rows] == [None] * 6
    assert {row["settings"]["user_agent"] for row in rows} == {"experiment/7"}
    assert any("experiment/7" in path.read_text() for path in (paths.work / "registry").rglob("*.log"))
    by_arm = {(row["arm"], row["start"]): row for row in rows}
    plain, lazy = by_arm["overlayfs", "cold"], by_arm["obdlab", "cold"]
    # Cold is proved: nothing was there, and everything that was needed came from the registry.
    assert set(lazy["evidence"].values()) == {0}
    assert plain["bytes_received"] > 4_000_000
    assert 0 < lazy["bytes_received"] < plain["bytes_received"]
    assert plain["requests"] >= 7
    for row in rows:
        assert 0 < row["cpu_s"] < 60
        assert row["pss_bytes"] > row["container_pss_bytes"] > 0
        # The full pull has the layers twice, as they came and unpacked.
        assert plain["disk_bytes"] > 2 * plain["bytes_received"] > 2 * lazy["disk_bytes"] > 0
        assert (row["round_trip_waits"] > 0) == (row["start"] == "cold")
        assert row["round_trip_waits"] <= row["requests"]
        assert row["host"]
    # The link's counter adds headers and ends when it is ready; the registry's includes what was under way.
    assert plain["link_bytes"] > plain["bytes_received"]
    assert lazy["link_bytes"] > 0
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
    # What is measured is not measured again, and what was declared is known.
    assert last_spec(tmp_path / "results") == spec
    assert Experiment(spec, tmp_path / "results", paths).run() == 0


@pytest.mark.containerd
@pytest.mark.slow
def test_images_as_one_file_start_like_the_others(tmp_path: Path, paths: LabPaths) -> None:
    spec = SPEC.with_values(snapshotters=["erofs", "loop"], a_a=False, disks=["native", "cloud"], dropped_starts=1)
    experiment = Experiment(spec, tmp_path / "results", paths)
    experiment.run()
    rows = experiment.rows()
    assert [row.get("error") for row in rows] == [None] * 12
    assert {row["disk"] for row in rows} == {"native", "cloud"}
    for row in rows:
        assert (row["bytes_received"] > 500_000) == (row["start"] == "cold")
        assert (row["evidence"]["resident_bytes"] > 0) == (row["start"] == "warm")
    assert "mkfs.erofs" in experiment.environments()[0]["compared"]["erofs"]
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.containerd
def test_images_completed_beforehand_start_without_registry_and_server(tmp_path: Path, paths: LabPaths) -> None:
    names = ["obdlab-local", "obdlab-local-compressed"]
    spec = SPEC.with_values(snapshotters=names, a_a=False, repeats=1, dropped_starts=1)
    experiment = Experiment(spec, tmp_path / "results", paths)
    experiment.run()
    rows = experiment.rows()
    assert [row.get("error") for row in rows] == [None] * 6
    for row in rows:
        assert (row["requests"] > 0) == (row["start"] == "cold")
        if row["arm"] == "obdlab-local-compressed":
            assert (row["evidence"]["resident_bytes"] > 0) == (row["start"] == "warm")
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.containerd
def test_full_pulls_and_all_arms_over_tls(tmp_path: Path, paths: LabPaths) -> None:
    names = ["overlayfs", "overlayfs-zstd", "erofs-layers", "obdlab-64k"]
    spec = SPEC.with_values(snapshotters=names, a_a=False, warm_starts=0, tls=True)
    experiment = Experiment(spec, tmp_path / "results", paths)
    experiment.run()
    rows = {row["arm"]: row for row in experiment.rows()}
    assert [row.get("error") for row in rows.values()] == [None] * 4
    (environment,) = experiment.environments()
    assert environment["containerd_setup"]["tls"] is True
    assert environment["containerd_setup"]["daemons"] == "fresh for each cell"
    # The address of the registry's TLS host is none of the loopback's.
    assert not any(name.startswith("127.") for name in environment["images"]["tiny"].values())
    # Full pulls fetch all of the same layers; zstd's are smaller.
    assert rows["overlayfs"]["bytes_received"] == pytest.approx(rows["erofs-layers"]["bytes_received"], rel=0.01)
    assert rows["overlayfs-zstd"]["bytes_received"] < 0.9 * rows["overlayfs"]["bytes_received"]
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.containerd
@pytest.mark.slow
def test_lazy_peers_start_the_same_image(tmp_path: Path, paths: LabPaths) -> None:
    names = ["obdlab-prefetch", "stargz", "stargz-zstd", "stargz-recorded", "soci"]
    for name in names:
        try:
            check_programs(name, ADAPTERS[name].programs)
        except LabError as error:
            capabilities.missing("peers", str(error))
    experiment = Experiment(SPEC.with_values(snapshotters=names, a_a=False), tmp_path / "results", paths)
    experiment.run()
    rows = experiment.rows()
    assert [row.get("error") for row in rows] == [None] * 10
    assert all(experiment.environments()[0]["compared"][name] for name in names)
    for row in rows:
        if row["start"] == "cold":
            # tiny is 4.9 MB: nobody fetched it all before the container was ready.
            assert 0 < row["bytes_received"] < 4_000_000
            assert row["completion_bytes"] >= row["bytes_received"]
            assert not any(row["evidence"].values())
        else:
            assert row["requests"] == 0
    mounts = Path("/proc/self/mounts").read_text()
    assert str(tmp_path) not in mounts


@pytest.mark.containerd
def test_a_cell_that_takes_too_long_is_ended_and_the_others_go_on(tmp_path: Path, paths: LabPaths) -> None:
    spec = SPEC.with_values(snapshotters=["obdlab"], a_a=False, warm_starts=0, cell_timeout_s=0.05, repeats=2)
    experiment = Experiment(spec, tmp_path / "results", paths)
    assert experiment.run() == 2
    assert ["not done after 0.05 s" in row["error"] for row in experiment.rows()] == [True, True]
    patient = Experiment(spec.with_values(cell_timeout_s=300.0, repeats=1), tmp_path / "results", paths)
    assert patient.run() == 1
    assert [row.get("error") for row in patient.rows()] == [None]


@pytest.mark.containerd
def test_a_start_that_is_never_ready_is_a_row_with_its_error(tmp_path: Path, paths: LabPaths) -> None:
    path = str(paths.datasets[0] / "tiny" / "recipe.toml")
    spec = SPEC.with_values(images=[path], ready_timeout_s=0.001, snapshotters=["obdlab"], a_a=False)
    experiment = Experiment(spec, tmp_path / "results", paths)
    experiment.run()
    (row,) = experiment.rows()
    # An image that is given as a path is called by its recipe's name.
    assert (row["image"], row["recipe"]) == ("tiny", path)
    assert path not in "".join(experiment.report())
    assert "ready" in row["error"]
    assert row["start"] == "cold"
    assert "failed when cold" in caveats([row])[0]
    # It is not taken for measured.
    assert experiment.run() == 1
    # Nor does it stand in for what is measured otherwise.
    patient = Experiment(spec.with_values(ready_timeout_s=60.0), tmp_path / "results", paths)
    assert patient.run() == 1
    assert [row.get("error") for row in patient.rows()] == [None, None]
    assert patient.run() == 0


@pytest.mark.containerd
def test_two_experiments_do_not_share_a_host(tmp_path: Path, paths: LabPaths) -> None:
    with (
        only_experiment(),
        pytest.raises(LabError, match=f"another experiment runs on this host .process {os.getpid()}"),
    ):
        Experiment(SPEC, tmp_path / "results", paths).run()
    assert not (tmp_path / "work" / "host").exists()


def _attempt(spec: Spec, cell: Cell, attempt: int, **more: object) -> dict[str, object]:
    about = {"cell": spec.key(cell, "here"), "context": "here", "attempt": attempt, "start": "cold"}
    return {**about, **spec.columns(cell), **more}


def test_of_a_cell_the_last_good_attempt_counts(tmp_path: Path) -> None:
    spec = SPEC.with_values(a_a=False, repeats=2)
    cells = {(cell.point["arm"], cell.repeat): cell for cell in spec.cells()}
    experiment = Experiment(spec, tmp_path)
    experiment.store.append(
        [_attempt(spec, cells["obdlab", 0], 1, error="no"), _attempt(spec, cells["overlayfs", 0], 2)]
    )
    experiment.store.append(
        [_attempt(spec, cells["overlayfs", 0], 2, start="warm"), _attempt(spec, cells["obdlab", 0], 3)]
    )
    experiment.store.append(
        [_attempt(spec, cells["obdlab", 1], 4, error="no"), _attempt(spec, cells["obdlab", 1], 5, error="yes")]
    )
    (tmp_path / "spec.json").write_text(json.dumps({"context": "here"}))
    got = [(row["arm"], row["repeat"], row["attempt"], row.get("error")) for row in experiment.rows()]
    assert sorted(got, key=str) == [
        ("obdlab", 0, 3, None),
        ("obdlab", 1, 5, "yes"),
        ("overlayfs", 0, 2, None),
        ("overlayfs", 0, 2, None),
    ]
    done = {spec.key(cells[arm, 0], "here") for arm in ("obdlab", "overlayfs")}
    assert experiment.store.done_keys() == done


@pytest.mark.parametrize("key", ["python", "decoding", "packages"])
def test_rows_of_another_interpreter_or_library_do_not_count(tmp_path: Path, key: str) -> None:
    """Nor rows of earlier versions, whose context does not say which it was, but whose environment does."""
    here = {"code": "c", "kernel": "k", "python": "3.11", "decoding": "compiled", "packages": {"zstandard": "1"}}
    other = {**here, key: "another"}
    experiment = Experiment(SPEC, tmp_path)
    ours, theirs = experiment._contexts(here), experiment._contexts(other)
    assert ours[0] != theirs[0]
    assert set(ours[1:]) == set(theirs[1:])
    experiment.store.add_environment(other)
    assert experiment._contexts(here) == ours[:1]
    assert experiment._contexts(other) == theirs


def test_failed_attempts_that_were_measured_again_are_in_the_report(tmp_path: Path) -> None:
    spec = SPEC.with_values(a_a=False, repeats=3)
    experiment = Experiment(spec, tmp_path)
    (tmp_path / "spec.json").write_text(json.dumps({"context": "here"}))
    times = {"pull_s": 0.5, "create_s": 0.1, "start_s": 0.1, "ready_s": 0.3, "bytes_received": 10, "requests": 1}
    good = {**times, "total_s": 1.0, "environment": "e"}
    for cell in spec.cells():
        failed = {"environment": "e", "error": "no answer"}
        if cell.point["arm"] == "obdlab" and cell.repeat < 2:
            # Two starts of an attempt are one failure.
            starts = [_attempt(spec, cell, 1, **good), _attempt(spec, cell, 1, start="warm", **failed)]
            experiment.store.append([*starts, _attempt(spec, cell, 1, start="warm", **failed)])
        if cell.repeat == 2:
            experiment.store.append([_attempt(spec, cell, 2, **failed)])
        else:
            experiment.store.append([_attempt(spec, cell, 3, **good)])
    # Rows of another context are no part of the run.
    elsewhere = {**_attempt(spec, spec.cells()[0], 1, **failed), "cell": "elsewhere"}
    experiment.store.append([elsewhere])
    told = "2 failed attempts of obdlab were measured again."
    assert experiment.measured_again() == [told]
    report = "\n".join(experiment.report())
    assert told in report
    # The last attempt of a cell is listed as before.
    assert report.count("Left out: tiny") == 2


SIMULATED = Spec.from_values({
    "name": "sim", "kind": "simulation", "axes": {"hosts": [5]}, "repeats": 1, "load_limit": 1000.0
})  # fmt: skip


def test_a_second_run_of_a_results_directory_changes_nothing(tmp_path: Path, paths: LabPaths) -> None:
    (tmp_path / "spec.json").write_text("of the first run")
    (tmp_path / "rows.jsonl").write_text('{"half a row')
    with only_run(tmp_path), pytest.raises(LabError, match=f"another run writes here .process {os.getpid()}"):
        Experiment(SIMULATED, tmp_path, paths).run(again=True)
    assert (tmp_path / "spec.json").read_text() == "of the first run"
    assert (tmp_path / "rows.jsonl").read_text() == '{"half a row'
    with only_run(tmp_path):
        pass


def test_a_declaration_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, paths: LabPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = json.dumps({**SIMULATED.declaration(), "context": "here", "pins": {}})
    (tmp_path / "spec.json").write_text(old)

    def refused(source: str, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    monkeypatch.setattr("obdlab.system.newfile.os.replace", refused)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        Experiment(SIMULATED, tmp_path, paths).run()
    assert (tmp_path / "spec.json").read_text() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock", "spec.json"]


def test_a_misspelt_key_on_the_command_line_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("repeats = 1\n")
    assert main(["lab", "run", str(tmp_path / "x.toml"), "--set", "repeat=2"]) == 1
    assert "unknown key" in capsys.readouterr().err
    assert main(["lab", "run", str(tmp_path / "x.toml"), "--set", "repeats"]) == 1
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["lab", "run", str(tmp_path / "absent.toml")]) == 1
    assert "absent.toml" in capsys.readouterr().err


def test_nothing_measured_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["lab", "list", "--results", str(tmp_path)]) == 0
    assert "nothing measured yet" in capsys.readouterr().out


def test_how_far_a_run_is_and_what_it_goes_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text("repeats = 2\na_a = false\n")
    spec = ["status", str(tmp_path / "x.toml"), "--results", str(tmp_path)]
    assert main(["lab", *spec]) == 1
    assert "100 Mbit/s, 5 ms: 0 of 4 cells measured" in capsys.readouterr().out
    with pytest.raises(SpecError, match=r"spec\.json"):
        last_spec(tmp_path / "x")
    (tmp_path / "x" / "spec.json").write_text(json.dumps({**SPEC.declaration(), "context": "here"}))
    assert last_spec(tmp_path / "x") == SPEC
    assert main(["lab", "resume", "absent", "--results", str(tmp_path)]) == 1
    assert "not the spec of a run" in capsys.readouterr().err


def test_status_report_and_list_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text('images = ["tiny"]\nrepeats = 1\na_a = false\nrtts_ms = [2]\n')
    where = ["--results", str(tmp_path), "--json"]
    assert main(["lab", "status", str(tmp_path / "x.toml"), *where]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == {"experiment": "x", "conditions": "100 Mbit/s, 2 ms", "measured": 0, "cells": 2}
    spec = SPEC.with_values(a_a=False)
    times = {"pull_s": 0.5, "create_s": 0.1, "start_s": 0.1, "ready_s": 0.3, "bytes_received": 10, "requests": 1}
    for total_s, cell in enumerate(spec.cells(), 1):
        Experiment(spec, tmp_path / "x").store.append(
            [_attempt(spec, cell, 1, total_s=total_s, environment="e", **times)]
        )
    (tmp_path / "x" / "spec.json").write_text(json.dumps({**spec.declaration(), "context": "here"}))
    assert main(["lab", "show", "x", *where]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {each["arm"] for each in told["summaries"]} == {"overlayfs", "obdlab"}
    assert told["headlines"]
    assert main(["lab", "show", "x", "--results", str(tmp_path)]) == 0
    assert told["findings"][0][:30] in capsys.readouterr().out
    assert main(["lab", "list", *where]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["rows"], listed["failed"]) == ("x", 2, 0)


def test_rows_are_exported_in_the_format_of_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RowStore(tmp_path / "x")
    store.append([{"cell": "a", "evidence": {"images": 0}}, {"cell": "b"}])
    for name in ("rows.csv", "rows.jsonl"):
        assert main(["lab", "export", "x", str(tmp_path / name), "--results", str(tmp_path)]) == 0
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["cell,evidence.images", "a,0", "b,"]
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["evidence"] == {"images": 0}
    assert main(["lab", "export", "x", str(tmp_path / "rows.txt"), "--results", str(tmp_path)]) == 1
    assert main(["lab", "export", "y", str(tmp_path / "rows.csv"), "--results", str(tmp_path)]) == 1
    assert "holds no rows" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_ends_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    # What it has started is taken down on the way out, by whichever of the two.
    program = f"""
import time
from obdlab.cli.main import main
from obdlab.lab.run.experiment import Experiment
def run(self, **options):
    try:
        print("measuring", flush=True)
        time.sleep(60)
    finally:
        print("taken down", flush=True)
Experiment.run = run
raise SystemExit(main(["lab", "run", {str(QUICK)!r}, "--results", {str(tmp_path)!r}]))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"measuring\n"
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert out == b"taken down\n"
    assert child.returncode == 130
    assert b"the same command goes on where this one was" in err
