"""Declarations of container starts, in few words."""

from __future__ import annotations

from typing import Any

from obdlab.lab.run.spec import Spec


def declared(name: str = "x", **values: Any) -> Spec:
    """Return the spec with these keys of a declaration."""
    return Spec.from_values({"name": name, **values})
