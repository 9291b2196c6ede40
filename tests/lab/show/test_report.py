from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from obdlab.lab.kinds import KINDS
from obdlab.lab.show.report import ReportError, check_parameters, run_notebook
from tests.lab.declared import declared

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"
# ipykernel and zmq warn about their own event loops; the pages are what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


#: Both are untyped upstream.
v4: Any = nbformat.v4
write: Any = nbformat.write


def _notebook(path: Path, *cells: str) -> Path:
    notebook = v4.new_notebook()
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells = [v4.new_code_cell(source) for source in cells]
    notebook.cells[0].metadata.tags = ["parameters"]
    write(notebook, path)
    return path


def test_an_unknown_parameter_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    notebook = _notebook(tmp_path / "n.ipynb", "rate_mbit = 100.0", "open('ran', 'w').close()")
    with pytest.raises(ReportError, match=r"unknown parameters \(got rate_mbt, wanted among rate_mbit\)"):
        run_notebook(notebook, {"rate_mbt": 10.0}, tmp_path / "out.ipynb")
    assert not (tmp_path / "ran").exists()


def test_a_page_shows_output_and_not_the_code(tmp_path: Path) -> None:
    notebook = _notebook(tmp_path / "n.ipynb", "rate_mbit = 100.0", "print('rate', rate_mbit * 2)")
    page = run_notebook(notebook, {"rate_mbit": 21.0}, tmp_path / "out" / "report.ipynb")
    text = page.read_text()
    assert "rate 42.0" in text
    assert "rate_mbit * 2" not in text


def test_a_failing_cell_names_its_error_and_leaves_the_page(tmp_path: Path) -> None:
    notebook = _notebook(tmp_path / "n.ipynb", "x = 1", "raise KeyError('no such row')")
    with pytest.raises(ReportError, match=r"KeyError.*no such row.*report\.html"):
        run_notebook(notebook, {}, tmp_path / "report.ipynb")
    assert "no such row" in (tmp_path / "report.html").read_text()


def test_a_missing_notebook_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"absent\.ipynb: no such notebook"):
        check_parameters(tmp_path / "absent.ipynb", {})


def test_the_startup_notebook_takes_every_key_of_a_declaration_that_changes_what_is_measured() -> None:
    check_parameters(NOTEBOOKS / KINDS["start"].notebook, declared().declaration())
