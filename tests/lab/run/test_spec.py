from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import ObdlabError
from obdlab.lab.run.spec import AA_SUFFIX, Cell, Spec, SpecError


def test_declaration_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "quick.toml"
    path.write_text('images = ["redis", "pydata"]\nrates_mbit = [100, 1000.5]\nrepeats = 2\na_a = false\n')
    spec = Spec.load(path)
    assert spec.name == "quick"
    assert spec.rates_mbit == (100.0, 1000.5)
    assert spec.arms == ("overlayfs", "obdlab")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("repeat = 3", "unknown key"),
        ('repeats = "3"', "repeats: wanted int"),
        ("repeats = true", "repeats: wanted int"),
        ("repeats = 0", "repeats must be at least 1"),
        ("images = []", "images: must name"),
        ('images = "redis"', "images: wanted a list"),
        ('images = ["a", "a"]', "each once"),
        ('snapshotters = ["zfs"]', "unknown name"),
        ("rates_mbit = [0]", "rates_mbit must be positive"),
        ('disks = ["floppy"]', "disks: unknown name"),
        ('workload = "find"', "workload: unknown"),
        ("cell_timeout_s = 0", "must be positive"),
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
        Spec.load(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"absent\.toml"):
        Spec.load(tmp_path / "absent.toml")


def test_every_repeat_holds_every_arm_once_in_its_own_order() -> None:
    spec = Spec("x", images=("redis", "pydata"), repeats=6)
    cells = spec.cells(100.0, 5.0)
    blocks = [cells[start : start + 6] for start in range(0, len(cells), 6)]
    for repeat, block in enumerate(blocks):
        assert {(cell.image, cell.arm) for cell in block} == {(i, a) for i in spec.images for a in spec.arms}
        assert {cell.repeat for cell in block} == {repeat}
    orders = {tuple((cell.image, cell.arm) for cell in block) for block in blocks}
    assert len(orders) > 1
    assert cells == spec.cells(100.0, 5.0)
    assert cells != Spec("x", images=spec.images, repeats=6, seed=1).cells(100.0, 5.0)


def test_the_a_a_arm_is_the_baseline_under_another_label() -> None:
    cell = Cell("redis", "overlayfs" + AA_SUFFIX, 100.0, 5.0, "lz4", 4096, 0)
    assert cell.snapshotter == "overlayfs"
    assert cell.key("host") != Cell("redis", "overlayfs", 100.0, 5.0, "lz4", 4096, 0).key("host")
    assert cell.key("host") != cell.key("other host")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_declaration_or_a_clear_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "any.toml"
        path.write_bytes(data)
        try:
            Spec.load(path)
        except ObdlabError as error:
            assert "any.toml" in str(error)
