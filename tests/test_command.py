"""The command lines in messages are ones that run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab import command as module
from obdlab.command import command, install_command, pip_command

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment's bin directory with an obdlab in it, below the working directory and not on PATH."""
    directory = tmp_path / "work" / ".venv" / "bin"
    directory.mkdir(parents=True)
    for name in ("python", "obdlab", "pip"):
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(directory / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path / "work")
    return directory


def test_an_environment_that_is_not_on_path_is_named(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("lab", "dataset", "build", "redis") == ".venv/bin/obdlab lab dataset build redis"
    monkeypatch.chdir("/")
    assert command("doctor") == f"{environment}/obdlab doctor"


def test_on_path_the_name_is_enough(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{environment}{os.pathsep}/usr/bin")
    assert command("doctor") == "obdlab doctor"
    # As pipx lays it: a link in a directory of PATH.
    links = environment.parent / "links"
    links.mkdir()
    (links / "obdlab").symlink_to(environment / "obdlab")
    monkeypatch.setenv("PATH", str(links))
    assert command("doctor") == "obdlab doctor"
    # Another installation's obdlab is another one.
    (links / "obdlab").unlink()
    (links / "obdlab").write_text("#!/bin/sh\n")
    (links / "obdlab").chmod(0o755)
    assert command("doctor") == ".venv/bin/obdlab doctor"


def test_without_a_script_the_module_is_run(environment: Path) -> None:
    (environment / "obdlab").unlink()
    assert command("doctor") == ".venv/bin/python -m obdlab doctor"


def test_extras_are_added_to_this_installation(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "checkout_directory", lambda: Path.cwd())
    assert install_command("lab") == ".venv/bin/pip install -e '.[lab]'"
    monkeypatch.setattr(module, "checkout_directory", lambda: None)
    assert install_command("lab") == ".venv/bin/pip install 'obdlab[lab]'"
    assert pip_command("pyarrow") == ".venv/bin/pip install pyarrow"


def test_the_command_that_a_message_names_runs() -> None:
    program = "from obdlab.command import command; print(command('doctor', '--help'))"
    named = subprocess.check_output([sys.executable, "-c", program], cwd="/", text=True).strip()
    assert subprocess.check_output(named, shell=True, cwd="/", text=True).startswith("usage: obdlab doctor")


def test_no_message_names_a_command_by_itself() -> None:
    # Words that ask the reader to run something; help texts and names in logs are none.
    asks = re.compile(
        r"""(?:see:?|first:|run|to \w+ (?:it|that)[^"']*:|pip install|with:?) `?obdlab [a-z]|pip install '?obdlab"""
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "obdlab").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if asks.search(line) and re.search(r"""["'].*(obdlab|pip install)""", line)
    ]
    assert not found, f"use obdlab.command.command: {', '.join(found)}"
