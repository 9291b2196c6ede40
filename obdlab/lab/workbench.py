"""The places of datasets, experiments and notebooks: in the checkout, or in the installed package.

A wheel carries the checkout's three folders as package data below ``obdlab/workbench`` (``packaging/wheel.py``).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from obdlab.command import checkout_directory
from obdlab.lab.testbed.process import LabError

Folder = Literal["datasets", "experiments", "notebooks"]


def folder(name: Folder) -> Path:
    """Return one of the three folders: the checkout's, else the installed package's. Raises LabError without both."""
    checkout = checkout_directory()
    package = Path(str(resources.files("obdlab"))) / "workbench"
    places = [place / name for place in (checkout, package) if place is not None]
    for place in places:
        if place.is_dir():
            return place
    raise LabError(
        f"this installation has no {name} (looked in {' and '.join(map(str, places))}): they come with a checkout, "
        "and with a wheel that is built from one"
    )


def dataset_folders() -> tuple[Path, ...]:
    """Return the folders of recipes: ``datasets`` in the working directory, then the workbench's."""
    return tuple(dict.fromkeys(place.resolve() for place in (Path("datasets"), folder("datasets"))))


def find(name: Folder, given: Path) -> Path:
    """Return ``given`` if it exists, else the workbench's file of this name.

    "experiments/quick.toml" and "quick.toml" both name the workbench's quick.toml from any working directory. If the
    file is in neither place, ``given`` is returned, so that the caller's error names it.
    """
    if given.exists() or given.is_absolute():
        return given
    parts = given.parts[1:] if given.parts[0] == name else given.parts
    found = folder(name).joinpath(*parts)
    return found if found.is_file() else given


def default_results() -> Path:
    """Return the default directory of results: ``results`` in the checkout, or in the working directory."""
    return (checkout_directory() or Path.cwd()) / "results"
