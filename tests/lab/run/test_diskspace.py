"""Full disks: said before a run that cannot fit, named in one line when one fills up, never a row."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.cli.main import main
from obdlab.lab.paths import LabPaths
from obdlab.lab.run import diskspace
from obdlab.lab.run.diskspace import DiskFullError
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.plan import Plan, plan_run
from obdlab.lab.run.rows import RowStore
from obdlab.lab.testbed.containerd import OwnContainerd
from obdlab.lab.testbed.process import LabError
from tests.lab.declared import declared

if TYPE_CHECKING:
    from collections.abc import Iterator

DATASETS = (Path(__file__).parents[3] / "datasets",)
SPEC = declared(
    "tiny", images=("tiny",), snapshotters=("overlayfs",), a_a=False, repeats=2, warm_starts=0, load_limit=1000.0
)


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\1" * 65536)
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(b"\1" * 64)


def test_failures_for_want_of_space_are_told_from_others(tmp_path: Path) -> None:
    diskspace.check(LabError("connection refused"), [tmp_path])
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x")),
        LabError("ctr: exit status 1\n  | unpacking\n  | ctr: write /x: no space left on device"),
    ):
        with pytest.raises(DiskFullError) as caught:
            diskspace.check(error, [tmp_path])
        text = str(caught.value)
        assert "\n" not in text
        assert f"{tmp_path}" in text
        assert "no space left on device" in text.lower()


def test_directories_of_one_disk_share_its_room(tmp_path: Path) -> None:
    room = diskspace.room(tmp_path / "not" / "there")
    assert 0 < room.free < room.size
    half = int(room.free * 0.6)
    Plan(1, (), 60.0, {tmp_path: half}).check()
    with pytest.raises(DiskFullError, match=r"not enough disk: .* GB free .wanted about .* GB"):
        Plan(1, (), 60.0, {tmp_path / "a": 2 * half, tmp_path / "b": 2 * half}).check()


def test_what_a_run_builds_and_how_long_it_takes_is_estimated(tmp_path: Path) -> None:
    paths = LabPaths(DATASETS, tmp_path / "images", tmp_path / "work")
    spec = SPEC.with_values(images=["wordpress"], repeats=10)
    slow, fast = (
        plan_run(at, at.cells(), paths) for at in (spec.with_values(rates_mbit=[rate]) for rate in (10.0, 1000.0))
    )
    assert slow.seconds > 10 * 167 * 8 / 10 > fast.seconds
    assert fast.cells == 10
    (first, *disks) = fast.lines("x")
    assert "x: 10 cells to measure, about" in first
    assert "to build first: wordpress (167 MB)" in first
    assert all(line.startswith("disk: needs about") and "free" in line for line in disks)


@pytest.mark.containerd
def test_a_disk_on_which_it_cannot_fit_is_refused_first(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "12m") as disk:
        paths = LabPaths(DATASETS, disk / "images", disk / "work")
        with pytest.raises(DiskFullError, match="not enough disk"):
            Experiment(SPEC, tmp_path / "results", paths).run()
        assert not (disk / "images").exists()
    assert RowStore(tmp_path / "results").rows() == []


@pytest.mark.containerd
def test_a_disk_that_fills_up_ends_the_run_and_its_cell_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pulls = OwnContainerd.pull, []
    with small_disk(tmp_path / "disk", "160m") as disk:

        def pull(self: OwnContainerd, reference: str) -> None:
            pulls.append(reference)
            if len(pulls) == 2:
                fill(disk / "others")
            real(self, reference)

        monkeypatch.setattr(OwnContainerd, "pull", pull)
        monkeypatch.setattr("obdlab.lab.run.measuring.code_digest", lambda kind: "same")
        paths = LabPaths(DATASETS, disk / "images", disk / "work")
        experiment = Experiment(SPEC, tmp_path / "results", paths)
        with pytest.raises(DiskFullError, match=f"disk full: {disk}") as caught:
            experiment.run()
        assert "\n" not in str(caught.value)
        assert [row.get("error") for row in experiment.rows()] == [None]
        assert str(disk / "work") not in Path("/proc/self/mounts").read_text()
        (disk / "others").unlink()
        assert experiment.run() == 1
        assert [row.get("error") for row in experiment.rows()] == [None, None]


@pytest.mark.kernel
def test_rows_that_find_no_room_are_one_line_and_no_half_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obdlab.lab.run.measuring.code_digest", lambda kind: "same")
    declaration = tmp_path / "index.toml"
    declaration.write_text(
        'kind = "index"\nrepeats = 40\nload_limit = 1000\n[axes]\nsegments = [100]\nlayers = [1]\n'
    )
    with small_disk(tmp_path / "disk", "24k") as disk:
        words = ["lab", "run", str(declaration), "--results", str(disk)]
        assert main(words) == 1
        (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("obdlab lab run:")]
        assert f"disk full: {disk}" in told
        store = RowStore(disk / "index")
        stored = store.path.read_bytes()
        assert stored.endswith(b"\n")
        assert 0 < len(store.rows()) < 40
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert main(words) == 0
        assert len(store.rows()) == 40
        assert store.path.read_bytes().startswith(stored)
