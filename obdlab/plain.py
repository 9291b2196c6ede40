"""Values as JSON or TOML has them, checked by type, key by key: the documents that users write."""

from __future__ import annotations

import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Self

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    dict: "an object",
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
    return f"{_got(value)}, wanted {describe(hint)}"


def _got(value: object) -> str:
    text = repr(value)
    return f"got {text if len(text) <= 100 else text[:97] + '...'}"


class Table:
    """An object of a document. Its values are checked by type when they are read; null stands for a missing key.

    ``name`` is the document's, ``error`` the class of the errors that every method raises. They name document, key,
    value and the wanted value.
    """

    def __init__(self, values: object, name: str, error: type[Exception], key: str = "") -> None:
        self.name = name
        self._error = error
        self._prefix = f"{key}." if key else ""
        if not isinstance(values, dict):
            raise error(f"{name}: {key}: wrong value ({_got(values)}, wanted an object)")
        self.values: dict[str, Any] = values

    @classmethod
    def of_json(cls, text: str | bytes, name: str, error: type[Exception]) -> Self:
        """Parse a document."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as wrong:
            raise error(f"{name}: not JSON ({wrong})") from wrong
        if not isinstance(document, dict):
            raise error(f"{name}: not a JSON object (got {type(document).__name__})")
        return cls(document, name, error)

    def wrong(self, key: str, value: object, wanted: str) -> Exception:
        """Return the error for a value."""
        return self._error(f"{self.name}: {self._prefix}{key}: wrong value ({_got(value)}, wanted {wanted})")

    def get(self, key: str, hint: Any, default: Any = None) -> Any:
        """Return a value of the type ``hint``, see :func:`from_plain`."""
        value = self.values.get(key)
        if value is None:
            return default
        try:
            return from_plain(value, hint)
        except TypeError as error:
            raise self._error(f"{self.name}: {self._prefix}{key}: wrong value ({error})") from error

    def text(self, key: str) -> str:
        """Return a string without the blanks around it; '' if the key is missing."""
        value: str = self.get(key, str, "")
        return value.strip()

    def number(self, key: str, default: Any = None, *, least: int, most: int) -> Any:
        """Return a whole number from ``least`` to ``most``."""
        value = self.get(key, int, default)
        if value is not None and not least <= value <= most:
            raise self.wrong(key, value, f"a number from {least} to {most}")
        return value

    def word(self, key: str, words: tuple[str, ...]) -> str:
        """Return one of the words; the first one if the key is missing or empty."""
        value = self.text(key) or words[0]
        if value not in words:
            raise self.wrong(key, value, f"one of {', '.join(words)}")
        return value

    def path(self, key: str) -> Path | None:
        """Return an absolute path; None if the key is missing or empty."""
        text = self.get(key, str)
        if not text:
            return None
        if not text.startswith("/") or not _is_path(text):
            raise self.wrong(key, text, "an absolute path")
        return Path(text)

    def paths(self, key: str, default: tuple[Path, ...] = ()) -> tuple[Path, ...]:
        """Return a list of absolute paths."""
        found: tuple[Path, ...] = self.get(key, tuple[Path, ...], default)
        if not all(path.is_absolute() for path in found):
            raise self.wrong(key, self.values[key], "a list of absolute paths")
        return found

    def table(self, key: str) -> Table:
        """Return an object in this one; an empty one if the key is missing."""
        value = self.values.get(key)
        return Table({} if value is None else value, self.name, self._error, f"{self._prefix}{key}")

    def tables(self, key: str) -> list[Table]:
        """Return the objects of a list in this one."""
        value = self.values.get(key)
        if not isinstance(value, list | None):
            raise self.wrong(key, value, "a list of objects")
        return [
            Table(each, self.name, self._error, f"{self._prefix}{key}[{i}]") for i, each in enumerate(value or ())
        ]
