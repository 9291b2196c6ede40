"""The page of states, made from the tables of the code: every ``TRANSITIONS`` and its ``State``."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import enum
    from pathlib import Path

MODULES = {
    "Units of a cached blob, as one process sees them": "obdlab.cache.unitstate",
    "The device of a keeper": "obdlab.server.keeperstate",
    "Writable layers": "obdlab.layers.upperstate",
}
_HEAD = """# States

These objects change their state only as their table says (`obdlab.states`); any other change raises an error.
"""
_MEMBER = re.compile(r"((?:^ +#: .*\n)+) +(\w+) = ", re.MULTILINE)


def page() -> str:
    """Return the page."""
    return _HEAD + "".join(_section(title, name) for title, name in MODULES.items())


def write_page(path: Path) -> None:
    """Write the page, if it is not there with the same content."""
    text = page()
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _section(title: str, name: str) -> str:
    module = importlib.import_module(name)
    states: type[enum.Enum] = module.State
    meanings = {
        member: " ".join(line.strip().removeprefix("#: ") for line in comment.strip().splitlines())
        for comment, member in _MEMBER.findall(inspect.getsource(states))
    }
    rows = []
    for state in states:
        following = ", ".join(f"`{each.value}`" for each in states if each in module.TRANSITIONS[state])
        rows.append(f"| `{state.value}` | {meanings[state.name]} | {following or '-'} |\n")
    return f"\n## {title}\n\n`{name}`\n\n| state | meaning | next |\n|---|---|---|\n{''.join(rows)}"
