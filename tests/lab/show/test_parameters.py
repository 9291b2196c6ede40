"""A notebook given a wrong parameter ends with an error, by papermill's own command as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.lab.show.parameters import ParameterError, check_given

ROOT = Path(__file__).parents[3] / "notebooks"
NOTEBOOKS = sorted(ROOT.rglob("*.ipynb"))
DECLARED = {"repeats": "int", "rates": "list", "load_limit": "float", "name": "str", "measure": bool}
VALUES = {"repeats": 5, "rates": [1.0], "load_limit": 1, "name": "x", "measure": True}


def given(*sources: str, **more: object) -> dict[str, object]:
    return {"__annotations__": DECLARED, "In": ["", *sources], **VALUES, **more}


def test_what_is_declared_is_returned() -> None:
    assert check_given(given("# Parameters\nrepeats = 5\n", other=3)) == VALUES


def test_an_unknown_name_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ParameterError, match=r"got repeat; wanted among repeats .int., rates .list."):
        check_given(given("# Parameters\nrepeat = 1\n", repeat=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repeats", "3"),
        ("repeats", True),
        ("repeats", 1.5),
        ("rates", 100),
        ("load_limit", "low"),
        ("measure", 1),
        ("name", 7),
    ],
)
def test_a_wrong_type_is_an_error(name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=f"{name}: wanted"):
        check_given(given(**{name: value}))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_every_notebook_checks_its_parameters(notebook: Path) -> None:
    text = notebook.read_text()
    assert "check_given(globals())" in text
    assert text.index("check_given(globals())") > text.index("from __future__ import annotations")


@pytest.mark.parametrize(("word", "told"), [("repeat", "unknown parameter"), ("repeats", "repeats: wanted int")])
def test_papermill_itself_fails(tmp_path: Path, word: str, told: str) -> None:
    words = [str(ROOT / "cold_warm_startup.ipynb"), str(tmp_path / "out.ipynb"), "-p", "measure", "false"]
    value = "1" if word == "repeat" else "many"
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *words, "-p", word, value],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert told in done.stderr
