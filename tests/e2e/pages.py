"""The commands on the pages of the docs, and notes for the test that runs them.

Every line of a block of code is a command, unless the block's language is one of ``NOT_COMMANDS``; in a ``console``
block every line after a prompt is. Notes are HTML comments, which the site does not show. They hold for the lines
below them:

``<!-- test: with NAME=VALUE ... -->``
    Words of the commands below that stand for something of the reader's.
``<!-- test: first COMMANDS -->``
    Commands that are run here and not shown: they prepare the next block, or wait for something.
``<!-- test: status N ["BEGINNING"] -->``
    The lines with this beginning, in the next block, end with this exit status; "any": one that the host decides.
``<!-- test: background "BEGINNING" -->``
    The lines with this beginning, in the next block, run until the page's end.
``<!-- test: interrupt "BEGINNING" -->``
    The line with this beginning, in the next block, gets a Ctrl-C after some seconds.
``<!-- test: skip REASON ["BEGINNING"] -->``
    The next block, or its lines with this beginning, is not run, for one of the ``REASONS``.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_COMMANDS = frozenset({"text", "toml", "json", "python", "yaml", "{toctree}", "{eval-rst}", "{automodule}"})
#: Why a line is not run.
REASONS = {
    "packages": "installs packages of the system",
    "hours": "takes from many minutes to hours; its parts have tests of their own",
    "dataset": "builds an image from the archive of Debian",
    "systemd": "needs systemd as process 1: tests/server/underinit runs the units",
    "modules": "needs kernel modules that only the virtual machine of tests/vm has",
    "elided": "shows part of a command of another program",
    "forever": "ends with the user: a server in the foreground, or a window",
}

_PARTS = re.compile(
    r"^<!-- test: (?P<note>.*?)\s*-->$"
    r"|^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<block>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_PROMPT = re.compile(r"^(?:[\w.-]*[#$]) (?=\S)")
_INTERRUPT_S = 10
_HERE = re.compile(r"<<'?(\w+)'?")


@dataclass(frozen=True)
class Line:
    """A command: its number of line, its text as on the page and as it is run, and what its notes say."""

    number: int
    shown: str
    text: str
    status: str = "0"
    background: bool = False
    interrupted: bool = False
    #: Not on the page.
    hidden: bool = False
    #: One of REASONS, or empty.
    skipped: str = ""


def lines_of(page: str) -> list[Line]:
    """Return the commands of a page, in order. Raises ValueError for a note that is none, or concerns no line."""
    found: list[Line] = []
    names: dict[str, str] = {}
    notes: list[tuple[str, str, str]] = []
    for part in _PARTS.finditer(page):
        number = page.count("\n", 0, part.start()) + 1
        if part["note"]:
            kind, _, rest = part["note"].partition(" ")
            if kind == "with":
                names |= dict(word.split("=", 1) for word in shlex.split(rest))
            elif kind == "first" or part["note"].startswith("first\n"):
                text = part["note"].removeprefix("first").strip("\n ")
                found.append(Line(number, text, text, hidden=True))
            else:
                notes.append(_note(kind, rest, number))
            continue
        if part["language"] in NOT_COMMANDS:
            continue
        lines = [
            Line(number + 1 + at, shown, _replaced(shown, names))
            for at, shown in _commands(part["block"], console=part["language"] == "console")
        ]
        for note in notes:
            lines = _noted(lines, *note, number)
        notes = []
        found += lines
    if notes:
        raise ValueError(f"a note without a block: {notes}")
    return found


def _note(kind: str, rest: str, number: int) -> tuple[str, str, str]:
    value, _, beginning = rest.partition(" ")
    if kind in ("background", "interrupt"):
        value, beginning = "", rest
    values = {"background": [""], "interrupt": [""], "status": ["any", *map(str, range(256))], "skip": list(REASONS)}
    if value not in values.get(kind, ()):
        raise ValueError(f"line {number}: no note: {kind} {rest}")
    return kind, value, beginning.strip().removeprefix('"').removesuffix('"')


def _noted(lines: list[Line], kind: str, value: str, beginning: str, number: int) -> list[Line]:
    if not any(line.shown.startswith(beginning) for line in lines):
        raise ValueError(f"line {number}: a note for no line of the block: {beginning}")
    changed = {
        "status": {"status": value},
        "background": {"background": True},
        "interrupt": {"interrupted": True},
        "skip": {"skipped": value},
    }[kind]
    return [replace(line, **changed) if line.shown.startswith(beginning) else line for line in lines]


def _commands(block: str, *, console: bool) -> Iterator[tuple[int, str]]:
    # A line that goes on in the next one, or has a here-document, is one command.
    lines = block.splitlines()
    at = 0
    while at < len(lines):
        begin, text = at, lines[at]
        at += 1
        if console:
            if not _PROMPT.match(text):
                continue
            text = _PROMPT.sub("", text)
        else:
            text = text.strip()
        while text.endswith("\\"):
            text += f"\n{lines[at]}"
            at += 1
        if here := _HERE.search(text):
            while not text.endswith(f"\n{here[1]}"):
                text += f"\n{lines[at]}"
                at += 1
        if text and not text.startswith("#"):
            yield begin, text


def _replaced(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w-])", lambda _, value=value: value, text)
    return text


def script(lines: list[Line]) -> str:
    """Return the commands for bash. Before each ``##AT n`` is printed; the first with a wrong status ends it."""
    text = []
    for line in lines:
        if line.skipped:
            continue
        text.append(f"echo '##AT {line.number}'")
        command = re.sub(r"  +#.*", "", line.text)
        if line.interrupted:
            text += [f"timeout --preserve-status -s INT {_INTERRUPT_S} {command}", f"ended $? {line.status}"]
        elif line.background or (command.endswith("&") and not line.hidden):
            text.append(f"in_background {line.number} {command.removesuffix('&')}")
        else:
            text += [line.text, f"ended $? {line.status}"]
    return "\n".join(text) + "\n"
