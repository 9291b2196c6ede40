from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import ObdlabError
from obdlab.lab.run.declaration import load
from obdlab.lab.run.rows import AA_SUFFIX
from obdlab.lab.run.spec import Cell, SpecError
from tests.lab.declared import declared


def test_declaration_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "quick.toml"
    path.write_text('images = ["redis", "pydata"]\nrates_mbit = [100, 1000.5]\nrepeats = 2\na_a = false\n')
    spec = load(path)
    assert spec.name == "quick"
    assert spec.axes["rate_mbit"] == (100.0, 1000.5)
    assert spec.arms == ("overlayfs", "obdlab")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("repeat = 3", "unknown key"),
        ('repeats = "3"', "repeats: wanted int"),
        ("repeats = true", "repeats: wanted int"),
        ("repeats = 0", r"repeats: wanted at least 1 .got 0"),
        ("images = []", "images: wanted a list of at least one value"),
        ('images = "redis"', "images: wanted a list"),
        ('images = ["a", "a"]', "images: wanted each value once"),
        ('snapshotters = ["zfs"]', "snapshotters: unknown name"),
        ("rates_mbit = [0]", "rates_mbit: wanted positive numbers"),
        ('disks = ["floppy"]', "disks: unknown name"),
        ('workload = "find"', "workload: unknown"),
        ("cell_timeout_s = 0", "cell_timeout_s: wanted a positive number"),
        ("ready_timeout_s = 0", "ready_timeout_s: wanted a positive number"),
        ("rates_mbit = [nan]", "rates_mbit: wanted a finite number"),
        ("rates_mbit = [100, 100.0]", "rates_mbit: wanted each value once"),
        ("rtts_ms = [[5]]", "rtts_ms: wanted float"),
        ("warm_starts = -1", "warm_starts: wanted at least 0"),
        ('images = ["a"]\naxes = {image = ["b"]}', "axes.image: given twice"),
        ("pause_s = -1", "pause_s: wanted 0 to 60"),
        ("settings = 3", "settings: wanted a table"),
        ("settings = {cache_unti = 4096}", "settings: no such setting .*cache_unti"),
        ('settings = {cache_unit = "4096"}', "settings: cache_unit: wrong value"),
        ('settings = {cache_dir = "/tmp"}', "settings: cache_dir is the experiment's own"),
        ("= 3", "quick.toml"),
    ],
)
def test_bad_declarations_say_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "quick.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=complaint):
        load(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"absent\.toml"):
        load(tmp_path / "absent.toml")


def test_every_repeat_holds_every_arm_once_in_its_own_order() -> None:
    spec = declared(images=("redis", "pydata"), repeats=6)
    cells = spec.cells()
    blocks = [cells[start : start + 6] for start in range(0, len(cells), 6)]
    for repeat, block in enumerate(blocks):
        assert {_what(cell) for cell in block} == {(i, a) for i in spec.images() for a in spec.arms}
        assert {cell.repeat for cell in block} == {repeat}
    orders = {tuple(map(_what, block)) for block in blocks}
    assert len(orders) > 1
    assert cells == spec.cells()
    assert cells != spec.with_values(seed=1).cells()


def _what(cell: Cell) -> tuple[object, object]:
    return cell.point["image"], cell.point["arm"]


def test_the_a_a_arm_is_the_baseline_under_another_label() -> None:
    spec = declared(repeats=1)
    cells = {cell.point["arm"]: cell for cell in spec.cells()}
    again, plain = cells["overlayfs" + AA_SUFFIX], cells["overlayfs"]
    assert spec.measured_point(again) == spec.measured_point(plain) == plain.point
    assert spec.key(again, "host") != spec.key(plain, "host")
    assert spec.key(again, "host") != spec.key(again, "other host")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_declaration_or_a_clear_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "any.toml"
        path.write_bytes(data)
        try:
            load(path)
        except ObdlabError as error:
            assert "any.toml" in str(error)


@pytest.mark.parametrize("module", ["kinds", "run.starts", "run.summary", "run.table", "show.figures"])
def test_any_part_can_be_imported_first(module: str) -> None:
    # Kinds bring their reports, and reports are about kinds.
    subprocess.run([sys.executable, "-c", f"import obdlab.lab.{module}"], check=True, timeout=120)
