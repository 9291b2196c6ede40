"""The evaluation from the command line: what is planned, resumed, refused; the notebooks and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.lab.paper import ledger, page
from obdlab.lab.paper.claims import CLAIMS
from obdlab.lab.paper.questions import QUESTIONS, runs
from obdlab.lab.paper.results import Results
from obdlab.lab.paper.running import chosen_runs, run_all, specs
from obdlab.lab.run.spec import SpecError
from obdlab.lab.show.report import ReportError, check_parameters, run_notebook
from obdlab.lab.workbench import folder
from tests.lab.paper.rows import everything

SMALL = ["--set", "index.axes.segments=[4500]", "--set", "index.axes.layers=[1]", "--set", "index.quiet_wait_s=0"]
NOTEBOOKS = folder("notebooks") / "evaluation"


def evaluate(results: Path, *words: str) -> int:
    return main(["lab", "evaluate", "index", "--no-report", "--results", str(results), *SMALL, *words])


def test_declarations_and_notebooks_are_there() -> None:
    planned = specs(runs(), quick=True, changes={})
    assert set(planned) == {run.name for run in runs()}
    assert specs(runs(), quick=False, changes={})["start"].repeats > planned["start"].repeats
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {each.key for each in QUESTIONS} | {"ledger"}


def test_changes_are_checked_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--set", "index.repeat=2"], ["--set", "indx.repeats=2"], ["--set", "index.axes.segment=[1]"]):
        assert evaluate(tmp_path / "results", *words) == 1
    assert "unknown key" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    with pytest.raises(SpecError, match="no such experiment"):
        specs(chosen_runs(["codec"]), quick=True, changes={"index": {"repeats": 1}})
    with pytest.raises(SpecError, match="index: precision: the ledger judges fixed numbers"):
        specs(chosen_runs(["index"]), quick=True, changes={"index": {"precision": 0.05}})


def test_the_ledger_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    measured = Path(__file__).parents[3] / "experiments" / "measured" / "evaluation"
    assert main(["lab", "report", "--json", "--results", str(measured)]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["key"] for entry in entries] == [claim.key for claim in CLAIMS]
    assert entries[0]["rows"] > 0
    assert entries[0]["experiments"] == ["depth"]


def test_a_parameter_that_a_notebook_does_not_know_fails() -> None:
    with pytest.raises(ReportError, match="unknown parameters"):
        check_parameters(NOTEBOOKS / "index.ipynb", {"result": "x"})


@pytest.mark.kernel
def test_measured_once_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    # Only the index: converting images takes longer than this test may.
    assert main(["lab", "evaluate", "--list"]) == 0
    assert "cold_start" in capsys.readouterr().out
    planned = specs([run for run in runs() if run.name == "index"], quick=True, changes={})
    assert planned["index"].repeats == 3
    spec = planned["index"].with_values(**{"axes.segments": [4500], "axes.layers": [1], "quiet_wait_s": 0})
    small = {"index": spec}
    said: list[str] = []
    stored = Results(results)
    assert run_all(small, stored, said.append) == {}
    assert run_all(small, stored, said.append) == {}
    assert "3 measured" in said[1]
    assert "all measured before" in said[3]

    executed = tmp_path / "index.ipynb"
    shown = run_notebook(NOTEBOOKS / "index.ipynb", {"results": str(results), "measure": False}, executed).read_text()
    assert "data:image/png" in shown
    assert "One core looks up more than 6 million" in shown
    assert f"{results.name}/index/rows.csv" in shown
    assert " cores, " in shown
    body = page._body(executed)
    assert "<h1" not in body
    raw = page._raw(Results(results))
    assert re.search(r"<tr id='raw-index'><td>index</td><td>3</td><td><a download='index.csv.gz'", raw)
    assert "not measured" in raw


def test_navigation_tells_what_has_rows_and_counts_have_an_order(tmp_path: Path) -> None:
    results = everything(tmp_path)
    results._rows["random_read"] = []
    lines = page._navigation(results).split("<a ")
    (empty,) = [line for line in lines if "class='empty'" in line]
    assert "href='#random_read'" in empty
    assert {f"href='#{asked.key}'" for asked in QUESTIONS} <= set(" ".join(lines).replace(">", " ").split())
    counts = re.findall(r"(\d+) ([a-z ]+)<", page._counts(ledger.ledger(results)))
    assert sum(int(count) for count, _ in counts) == len(CLAIMS)
    assert counts[0][1] == "reproduced"
    assert "@media print" in page._style()


@pytest.mark.slow
def test_the_whole_report_over_what_there_is(tmp_path: Path) -> None:
    target = page.build_report(Results(tmp_path / "none"), tmp_path / "report.html")
    text = target.read_text()
    for asked in QUESTIONS:
        assert f"id='{asked.key}'" in text
    links = set(re.findall(r"href='#([^']+)'", text))
    assert links <= set(re.findall(r"id='([^']+)'", text))
