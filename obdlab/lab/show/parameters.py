"""Parameters of a notebook, checked by the notebook itself: a wrong one ends it under every runner.

papermill puts the given values into a cell behind the declaration, and only warns about undeclared names. Without
the check a misspelt name would measure something else without an error.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Mapping

# The first line of the cell that papermill puts behind the declaration.
_GIVEN = "# Parameters"
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "dict": (dict,),
    "float": (float, int),
    "int": (int,),
    "list": (list, tuple),
    "str": (str,),
}


class ParameterError(ObdlabError):
    """A notebook got a parameter that it does not declare, or one of the wrong type."""


def check_given(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters by name; call it with ``globals()`` behind the cell that declares them.

    A declaration is an annotated assignment (``repeats: int = 5``). Raises ParameterError naming what is declared.
    """
    declared: dict[str, Any] = dict(namespace.get("__annotations__", {}))
    known = ", ".join(f"{name} ({_name(kind)})" for name, kind in declared.items())
    for source in namespace.get("In", ()):
        unknown = sorted(_assigned(source) - set(declared)) if source.startswith(_GIVEN) else []
        if unknown:
            raise ParameterError(f"unknown parameter (got {', '.join(unknown)}; wanted among {known})")
    values = {name: namespace[name] for name in declared}
    for name, value in values.items():
        kind = _name(declared[name])
        wanted = _TYPES.get(kind)
        # isinstance(True, int) holds in Python; a bool must not pass for a number.
        if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool")):
            raise ParameterError(f"{name}: wanted {kind} (got {value!r})")
    return values


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else str(getattr(kind, "__name__", kind))


def _assigned(source: str) -> set[str]:
    return {
        target.id
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
