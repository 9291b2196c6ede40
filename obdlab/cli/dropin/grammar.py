"""Command lines as the original's tools read them: one table per tool, and the exit status of each mistake.

The tools in C++ use CLI11, those in Go cobra or urfave/cli. Their grammars differ from argparse's defaults in these
points: no abbreviations; ``--flag=false``; with CLI11 one exit status per kind of mistake; with urfave/cli one dash
may do for two.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Style(Enum):
    """The library that reads a tool's command line."""

    CLI11 = "cli11"
    COBRA = "cobra"
    URFAVE = "urfave"


#: Exit status of a C++ tool's ``exit(-1)``.
FAILED_CPP = 255
_TRUE, _FALSE = ("true", "1", "on", "yes", "t"), ("false", "0", "off", "no", "f")


class ToolError(ObdlabError):
    """A tool cannot do what its arguments ask for."""


class UsageError(ObdlabError):
    """A malformed command line. ``status`` is the exit status; CLI11's are in its ExitCodes."""

    CONVERSION, VALIDATION, REQUIRED, EXTRAS, ARGUMENT_MISMATCH = 104, 105, 106, 109, 114

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class RefusedError(UsageError):
    """An option of the original that obdlab does not have."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One option. ``names`` with their dashes; the longest without dashes is its name among the values.

    ``default`` False makes it a switch, an int a number, a list repeatable; a str or None a text. ``existing`` wants
    a file that exists. ``refused`` is the reason why obdlab refuses it, unless its value is the default. One that is
    ``required`` may not be empty.
    """

    names: tuple[str, ...]
    help: str
    default: Any = False
    existing: bool = False
    refused: str = ""
    required: bool = False

    @property
    def shown(self) -> str:
        """The longest name, with its dashes."""
        return max(self.names, key=len)

    @property
    def dest(self) -> str:
        """The name among the values."""
        return self.shown.lstrip("-").replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """True if the option takes no value."""
        return isinstance(self.default, bool)


def switch(*names: str, help: str, refused: str = "", default: bool = False) -> Flag:  # noqa: A002 - as argparse's
    """Return an option without a value."""
    return Flag(names, help, default, refused=refused)


def option(
    *names: str,
    help: str,  # noqa: A002
    default: Any = "",
    existing: bool = False,
    refused: str = "",
    required: bool = False,
) -> Flag:
    """Return an option with a value."""
    return Flag(names, help, default, existing, refused, required)


@dataclass(frozen=True, slots=True)
class Operand:
    """A positional argument. ``number`` wants an integer of at least 0."""

    name: str
    help: str
    existing: bool = False
    required: bool = True
    number: bool = False


@dataclass(frozen=True, slots=True)
class Tool:
    """One command of the original. ``run`` gets the values, and as ``words`` the command line; it returns the status.

    With ``rest``, all words after the operands belong to the value ``rest``, options too.
    """

    name: str
    about: str
    style: Style
    run: Callable[[argparse.Namespace], int]
    flags: tuple[Flag, ...] = ()
    operands: tuple[Operand, ...] = ()
    rest: bool = False
    #: True for a service, which bounds its memory by itself.
    service: bool = False
    #: Exit status of a failure, 0 for that of the style.
    failure: int = 0

    @property
    def failed(self) -> int:
        """Exit status of a failure."""
        return self.failure or (FAILED_CPP if self.style is Style.CLI11 else 1)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the values of a command line. Raises UsageError, and SystemExit(0) after ``--help``."""
        parser = _Parser(prog=self.name, description=self.about, allow_abbrev=False)
        for each in self.flags:
            shown = each.help + (f" (refused: {each.refused})" if each.refused else "")
            how: dict[str, Any] = {"dest": each.dest, "default": each.default, "help": shown.replace("%", "%%")}
            if each.is_switch:
                how |= {"action": "store_true"}
            else:
                how |= {"action": "append" if isinstance(each.default, list) else "store", "metavar": "VALUE"}
            parser.add_argument(*self._spelt(each), **how)
        for operand in self.operands:
            parser.add_argument(operand.name, nargs="?", default="", help=operand.help)
        given = list(words)
        words, off = self._switches_off(given)
        try:
            if self.rest:
                parser.add_argument("rest", nargs=argparse.REMAINDER)
                values, extras = parser.parse_known_args(words)
            else:
                values, extras = parser.parse_known_intermixed_args(words)
        except _ArgumentError as error:
            raise self._wrong(str(error), UsageError.ARGUMENT_MISMATCH) from None
        if extras:
            raise self._wrong(
                f"The following argument{'s were' if len(extras) > 1 else ' was'} not expected: {' '.join(extras)}",
                UsageError.EXTRAS,
            )
        for dest in off:
            setattr(values, dest, False)
        self._check(values)
        values.prog, values.words = self.name, given
        return values

    def _spelt(self, flag: Flag) -> list[str]:
        if self.style is not Style.URFAVE:
            return list(flag.names)
        return [*flag.names, *(name[1:] for name in flag.names if name.startswith("--"))]

    # Takes --flag=true and --flag=false out of the words, as argparse's switches have no value.
    def _switches_off(self, words: list[str]) -> tuple[list[str], list[str]]:
        switches = {name: each.dest for each in self.flags if each.is_switch for name in self._spelt(each)}
        left: list[str] = []
        off: list[str] = []
        for number, word in enumerate(words):
            name, is_set, value = word.partition("=")
            if word == "--" or (self.rest and not word.startswith("-")):
                return left + words[number:], off
            if not is_set or name not in switches:
                left.append(word)
            elif value.lower() in _TRUE:
                left.append(name)
            elif value.lower() in _FALSE:
                off.append(switches[name])
            else:
                raise self._wrong(f"{name}: not true or false (got {value!r})", UsageError.CONVERSION)
        return left, off

    def _check(self, values: argparse.Namespace) -> None:
        for operand in self.operands:
            value = getattr(values, operand.name)
            if operand.required and not value:
                raise self._wrong(f"{operand.name} is required", UsageError.REQUIRED)
            if operand.existing and value:
                self._check_exists(operand.name, value)
            if operand.number:
                setattr(values, operand.name, self._number(operand.name, value))
        for each in self.flags:
            value = getattr(values, each.dest)
            if each.refused and value != each.default:
                raise RefusedError(f"{each.shown}: not possible here: {each.refused}", self.failed)
            if each.required and value == each.default:
                cpp = self.style is Style.CLI11
                text = f"{each.shown} is required" if cpp else f'Required flag "{each.shown.lstrip("-")}" not set'
                raise self._wrong(text, UsageError.REQUIRED)
            if each.existing and value and value != each.default:
                self._check_exists(each.shown, value)
            if isinstance(each.default, int) and not each.is_switch:
                setattr(values, each.dest, self._number(each.shown, str(value)))

    def _check_exists(self, name: str, path: str) -> None:
        if not os.path.exists(path) or os.path.isdir(path):
            raise self._wrong(f"{name}: File does not exist: {path}", UsageError.VALIDATION)

    def _number(self, name: str, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise self._wrong(f"Could not convert: {name} = {text}", UsageError.CONVERSION) from None
        if value < 0:
            raise self._wrong(f"{name}: Number less than 0: {text}", UsageError.VALIDATION)
        return value

    def _wrong(self, text: str, status: int) -> UsageError:
        return UsageError(text, status if self.style is Style.CLI11 else self.failed)


class _Parser(argparse.ArgumentParser):
    # All that argparse itself still refuses is a missing or surplus value of an option.
    def error(self, message: str) -> NoReturn:
        raise _ArgumentError(message)


class _ArgumentError(Exception):
    pass
