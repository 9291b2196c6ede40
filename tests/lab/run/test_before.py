"""Results that an earlier version measured (``before/``, by commit c082ba2): read, reported, gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from obdlab.cli.main import main
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.code import older_codes
from obdlab.lab.run.declaration import last_spec, load
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.rows import RowStore

BEFORE = Path(__file__).parent / "before"
MEASURED = Path(__file__).parents[3] / "experiments" / "measured"
CODES: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[3] / "obdlab" / "lab" / "data" / "codes.json").read_text()
)
#: Measured by code that no commit has.
_NO_COMMIT = "437dc7367db98dc5"


def _environment(directory: Path) -> dict[str, Any]:
    return next(iter(RowStore(directory).environments().values()))


@pytest.fixture(params=["index", "starts"])
def before(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(BEFORE / request.param, tmp_path / request.param))


def _on_its_host(monkeypatch: pytest.MonkeyPatch, directory: Path, code: str = "") -> Experiment:
    # The host that measured the rows, today, with the code that measured them: only the digest has another form.
    spec, facts = last_spec(directory), _environment(directory)
    known = CODES[facts["code"]][spec.kind]
    monkeypatch.setattr("obdlab.lab.run.experiment.host_facts", lambda kind, work: {**facts, "code": code or known})
    return Experiment(spec, directory, LabPaths(images=directory / "images", work=directory / "work"))


def test_rows_count_under_the_code_that_made_them(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = _on_its_host(monkeypatch, before)
    stored = experiment.store.rows()
    assert len(experiment.rows()) == len(stored)
    assert [done == count for done, count in experiment.progress().values()] == [True]
    # Nothing is measured, and the rows are still those of the last run.
    assert experiment.run() == 0
    assert last_spec(before) == experiment.spec
    assert experiment.rows() == Experiment(experiment.spec, before).rows()
    assert len(experiment.rows()) == len(stored)


def test_rows_do_not_count_under_other_code(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = _on_its_host(monkeypatch, before, "0123456789abcdef")
    assert [done for done, _ in experiment.progress().values()] == [0]
    # They are still the rows of the last run.
    assert len(experiment.rows()) == len(experiment.store.rows()) > 0


def test_a_cell_that_was_measured_again_counts_once(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = _on_its_host(monkeypatch, before)
    old = json.loads((before / "spec.json").read_text())["context"]
    experiment.run()
    today = json.loads((before / "spec.json").read_text())["context"]
    assert today != old
    (first, *_) = experiment.rows()
    cell = next(cell for cell in experiment.spec.cells() if experiment.spec.key(cell, old) == first["cell"])
    experiment.store.append([{**first, "cell": experiment.spec.key(cell, today), "attempt": 1, "error": "no"}])
    assert len(experiment.rows()) == len(experiment.store.rows()) - 1
    assert not any(row.get("error") for row in experiment.rows())


def test_the_declaration_is_the_same(before: Path) -> None:
    assert load(BEFORE / f"{before.name}.toml") == last_spec(before)


def test_results_are_shown_and_exported(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(before.parent)]
    assert main(["lab", "show", before.name, *where]) == 0
    shown = capsys.readouterr().out
    assert "segments" in shown if before.name == "index" else "tiny, 100 Mbit/s, 2 ms" in shown
    assert main(["lab", "show", before.name, "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out)["experiment"] == before.name
    assert main(["lab", "export", before.name, str(before.parent / "rows.csv"), *where]) == 0
    count = len(RowStore(before).rows())
    assert (before.parent / "rows.csv").read_text().count("\n") == count + 1


def _published() -> list[Path]:
    return sorted(path.parent for path in MEASURED.rglob("rows.jsonl"))


@pytest.mark.parametrize("directory", _published(), ids=lambda path: str(path.relative_to(MEASURED)))
def test_published_rows_count_under_the_code_that_made_them(directory: Path) -> None:
    spec = last_spec(directory)
    experiment = Experiment(spec, directory)
    latest = json.loads((directory / "spec.json").read_text())["context"]
    environments = RowStore(directory).environments()
    used = {row["environment"] for row in experiment.rows() if row["context"] == latest}
    assert used
    for environment in (environments[each] for each in used):
        if environment["code"] != _NO_COMMIT:
            # Rows since then carry the digest of the code that a kind measures.
            code = CODES.get(environment["code"], {}).get(spec.kind, environment["code"])
            assert code == environment["code"] or environment["code"] in older_codes(spec.kind, code)
            assert latest in experiment._contexts({**environment, "code": code})
