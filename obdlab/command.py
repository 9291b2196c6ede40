"""The obdlab and pip command lines in messages, written so that the reader can run them as they are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_NAME = "obdlab"


def command(*words: str) -> str:
    """Return the command line of this installation's ``obdlab``, such as "obdlab lab dataset build redis".

    A virtual environment that is not on PATH is named by its path, relative if it is below the working directory:
    ".venv/bin/obdlab lab dataset build redis".
    """
    return " ".join([_program(_NAME, "-m", _NAME), *words])


def install_command(extra: str) -> str:
    """Return the command line that adds an extra of the package, such as "lab", to this installation."""
    checkout = checkout_directory()
    if checkout is not None:
        return pip_command("-e", f"'{_readable(checkout)}[{extra}]'")
    return pip_command(f"'{_NAME}[{extra}]'")


def pip_command(*words: str) -> str:
    """Return the command line with which pip installs a package into the environment of this Python."""
    return " ".join([_program("pip", "-m", "pip"), "install", *words])


def checkout_directory() -> Path | None:
    """Return the root of the checkout that this package runs from, or None if it is installed."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


# The program of this Python's environment: its name if PATH finds it, else its path, else the module.
def _program(name: str, *module: str) -> str:
    import shutil

    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found is not None and Path(found).resolve() == beside.resolve():
        return name
    if os.access(beside, os.X_OK):
        return _readable(beside)
    return " ".join([_readable(Path(sys.executable)), *module])


def _readable(path: Path) -> str:
    try:
        here = Path.cwd()
    except OSError:  # the working directory was removed
        return str(path)
    below = path.is_relative_to(here) and here != Path("/")
    return str(path.relative_to(here)) if below else str(path)
