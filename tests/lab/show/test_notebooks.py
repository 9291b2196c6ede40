"""The evaluation's notebooks: what they declare, what they draw, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from IPython.display import display

from obdlab.lab.paper.questions import QUESTIONS
from obdlab.lab.paper.running import specs
from obdlab.lab.run.spec import SpecError
from obdlab.lab.show import notebook
from obdlab.lab.show.notebook import Page, changed
from obdlab.lab.show.parameters import ParameterError
from obdlab.lab.workbench import folder
from tests.lab.paper.rows import everything

KEYS = [asked.key for asked in QUESTIONS]


def cells(key: str) -> list[str]:
    """The code of a notebook's cells; the first declares its parameters."""
    found = json.loads((folder("notebooks") / "evaluation" / f"{key}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def run(key: str, **given: Any) -> dict[str, Any]:
    """Run a notebook's cells here, as a kernel does; return the names it leaves."""
    space: dict[str, Any] = {"display": display, "__name__": "__main__"}
    first, *rest = cells(key)
    exec(compile(first, key, "exec"), space)
    space |= given
    if unknown := set(given) - set(space["__annotations__"]):
        space["In"] = ["# Parameters\n" + "".join(f"{name} = 1\n" for name in unknown)]
    for source in rest:
        exec(compile(source, key, "exec"), space)
    return space


@pytest.mark.parametrize("key", KEYS)
def test_parameters_are_those_of_the_quick_declaration(key: str) -> None:
    space: dict[str, Any] = {}
    exec(compile(cells(key)[0], key, "exec"), space)
    given = {name: space[name] for name in space["__annotations__"]}
    page = Page(key, given)
    planned = specs(page.question.runs, quick=True, changes={})
    # So "obdlab lab evaluate" and the notebook measure the same cells, and each goes on where the other stopped.
    assert page.specs == planned
    first = planned[page.question.runs[0].name]
    varied = [axis for axis, values in first.axes.items() if len(values) > 1]
    short = {"image": "images", "arm": "snapshotters", "disk": "disks"}
    assert all(axis in given or short.get(axis) in given for axis in varied)


@pytest.mark.parametrize("key", KEYS)
def test_a_figure_is_drawn_of_the_rows(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("Agg")
    monkeypatch.setattr(notebook, "Results", everything)
    run(key, results=str(tmp_path), measure=False)
    kept = sorted(path.suffix for path in tmp_path.glob(f"figures/{key}.*"))
    assert kept == [".pdf", ".png", ".svg", ".txt"]
    assert "n = " in (tmp_path / "figures" / f"{key}.txt").read_text()


@pytest.mark.parametrize("key", ["scan_du", "index", "trace_prefetch"])
def test_without_rows_there_is_no_error(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mpl.use("Agg")
    run(key, results=str(tmp_path), measure=False)
    assert "Markdown" in capsys.readouterr().out


def test_what_the_experiment_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="repeats: wanted int"):
        Page("index", {"repeats": "many"})
    with pytest.raises(SpecError, match="unknown"):
        Page("index", {"segment": [1]})
    with pytest.raises(ParameterError, match="segmets"):
        run("index", segmets=[1], measure=False, results=str(tmp_path))


def test_plain_names_mean_axes_options_or_keys() -> None:
    spec = specs(Page("random_read", {}).question.runs, quick=True, changes={})["random_read"]
    found = changed(spec, {"iodepth": [2], "size_mib": 8, "repeats": 1})
    assert (found.axes["iodepth"], found.options["size_mib"], found.repeats) == ((2,), 8, 1)


@pytest.mark.kernel
def test_a_notebook_measures_what_has_no_row_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mpl.use("Agg")
    small = {"segments": [4500], "layers": [1], "repeats": 1, "quiet_wait_s": 0.0, "load_limit": 1000.0}
    page = Page("index", {**small, "results": str(tmp_path), "measure": True})
    page.specs = {"index": page.specs["index"]}  # converting images takes longer than this test may
    page.measure()
    assert "1 measured" in capsys.readouterr().out
    page.measure()
    assert "all measured before" in capsys.readouterr().out
    assert list(page.rows()["segments"]) == [4500]
