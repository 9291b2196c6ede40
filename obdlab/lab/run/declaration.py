"""Declarations of experiments of every kind: read from TOML or from a results directory, and opened."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.grid import GridExperiment, GridSpec
from obdlab.lab.run.spec import Spec, SpecError, read_declaration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from obdlab.lab.paths import LabPaths

AnySpec = Spec | GridSpec
#: The default kind of a declaration: container starts.
START = "start"
#: Keys that do not say what is measured; ``read_declaration`` always gives a name.
_ONLY_ABOUT = {"name", "description"}


def load(path: Path, *, quick: bool = False) -> AnySpec:
    """Read a declaration; ``quick`` applies the changes of its table [quick]. Raises SpecError."""
    values = read_declaration(path)
    changes = values.pop("quick", None)
    try:
        _check_declares(values)
        spec = from_values(values)
        if not quick:
            return spec
        if not isinstance(changes, dict):
            raise SpecError("quick: no such table (wanted one that says what is measured less)")
        return spec.with_values(**changes)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


# The defaults are a whole experiment: without this check an empty file would measure for minutes.
def _check_declares(values: Mapping[str, Any]) -> None:
    if set(values) <= _ONLY_ABOUT:
        raise SpecError(
            f"declares no experiment (got {', '.join(sorted(set(values) - {'name'})) or 'no key'}, wanted a kind, "
            f"or a key of container starts, such as images, snapshotters or repeats)"
        )


def from_values(values: Mapping[str, Any]) -> AnySpec:
    """Check keys and types of a parsed declaration. Raises SpecError."""
    given = dict(values)
    if given.get("kind", START) == START:
        given.pop("kind", None)
        return Spec.from_values(given)
    return GridSpec.from_values(given)


def last_spec(directory: Path) -> AnySpec:
    """Return the spec of the last run in a results directory. Raises SpecError."""
    path = directory / "spec.json"
    try:
        values = json.loads(path.read_text())
        values.pop("context")
        values.pop("pins", None)
        return from_values(values)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SpecError(f"{path}: not the spec of a run: {error}") from error


def open_experiment(spec: AnySpec, directory: Path, paths: LabPaths | None = None) -> Experiment | GridExperiment:
    """Return the experiment of a spec with the results directory ``directory``."""
    if isinstance(spec, Spec):
        return Experiment(spec, directory, paths)
    return GridExperiment(spec, directory, paths)
