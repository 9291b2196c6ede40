from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from obdlab.cli.lab import dataset
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.images.recipe import RecipeError

DATASETS = Path(__file__).parents[2] / "datasets"


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    dataset.declare(parser)
    args = parser.parse_args(words)
    status: int = args.run(args)
    return status


@pytest.mark.kernel
def test_build_writes_a_layout_and_list_knows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ("--work-dir", str(tmp_path / "work"), "--datasets", str(DATASETS))
    assert run("list", *places) == 0
    before = capsys.readouterr().out
    assert "6 layers, not built" in next(line for line in before.splitlines() if line.startswith("tiny"))
    assert run("build", "tiny", "--to", f"oci:{tmp_path / 'out'}", *places) == 0
    assert "layer 5/5" in capsys.readouterr().err
    assert len(OciLayout(tmp_path / "out").manifest.layers) == 6
    assert run("list", *places) == 0
    after = capsys.readouterr().out
    assert "6 layers, built" in next(line for line in after.splitlines() if line.startswith("tiny"))


def test_where_no_recipe_is_the_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"no recipes in {tmp_path} \(--datasets DIR names another place"):
        run("list", "--datasets", str(tmp_path))
    with pytest.raises(RecipeError, match=rf"no recipe named 'tiny' in {tmp_path} or /none \(--datasets DIR"):
        run("build", "tiny", "--datasets", str(tmp_path), "--datasets", "/none")
