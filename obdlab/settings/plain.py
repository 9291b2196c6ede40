"""Values of a dataclass as JSON values, and back with their types checked."""

from __future__ import annotations

import math
import os
import types
import typing
from pathlib import Path
from typing import Any

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    types.NoneType: "null",
}


def to_plain(value: object) -> Any:
    """Return ``value`` as a JSON value: paths become strings, tuples lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(value: object, hint: Any) -> Any:
    """Return a JSON value as the type ``hint``: bool, int, float, str, Path, a tuple of one type, or one or None.

    Raises TypeError with the value and the wanted type. Nothing is converted: "1" is not a number, 1 is not true.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        (inner,) = (each for each in arguments if each is not types.NoneType)
        try:
            return from_plain(value, inner)
        except TypeError:
            raise TypeError(_refusal(value, hint)) from None
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(_refusal(value, hint))
        return tuple(from_plain(item, arguments[0]) for item in value)
    if hint is float and type(value) is int and abs(value) < 1 << 64:
        return float(value)
    if hint is Path and type(value) is str and _is_path(value):
        return Path(value)
    if (
        hint not in _NAMES
        or type(value) is not hint
        or (hint is float and not math.isfinite(typing.cast("float", value)))
    ):
        raise TypeError(_refusal(value, hint))
    return value


def _is_path(text: str) -> bool:
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeError:
        return False


def describe(hint: Any) -> str:
    """Return a description of the values that a type hint allows."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"a list, each {describe(arguments[0])}"
    return " or ".join(_NAMES[each] for each in arguments) if arguments else _NAMES[hint]


def _refusal(value: object, hint: Any) -> str:
    text = repr(value)
    return f"got {text if len(text) <= 100 else text[:97] + '...'}, wanted {describe(hint)}"
