"""Declarations of experiments: read from TOML or from a results directory, and opened."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any

from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.spec import Spec, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from obdlab.lab.paths import LabPaths

#: Keys that do not say what is measured; a declaration always has a name.
_ONLY_ABOUT = {"name", "description"}


def load(path: Path, *, quick: bool = False) -> Spec:
    """Read a declaration, named by its file by default; ``quick`` applies the changes of its table [quick].

    Raises SpecError naming file and key.
    """
    try:
        values = {"name": path.stem, **tomllib.loads(path.read_text())}
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: {error}") from error
    changes = values.pop("quick", None)
    try:
        _check_declares(values)
        spec = Spec.from_values(values)
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


def last_spec(directory: Path) -> Spec:
    """Return the spec of the last run in a results directory. Raises SpecError."""
    path = directory / "spec.json"
    try:
        values = json.loads(path.read_text())
        values.pop("context")
        for key in ("pins", "same_contexts"):
            values.pop(key, None)
        return Spec.from_values(values)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SpecError) as error:
        raise SpecError(f"{path}: not the spec of a run: {error}") from error


def open_experiment(spec: Spec, directory: Path, paths: LabPaths | None = None) -> Experiment:
    """Return the experiment of a spec with the results directory ``directory``."""
    return Experiment(spec, directory, paths)
