"""The reference of the command line, made from the parsers of the ``obdlab`` command."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from obdlab.cli.main import build_parser

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HEAD = """# Command line

Each command as `--help` shows it. The exit status is 0 for success, 1 for a failure, 2 for wrong arguments, 130 after
Ctrl-C.
"""


def write_page(path: Path) -> None:
    """Write the page of all commands, if it is not there with the same content."""
    os.environ["COLUMNS"] = "100"  # argparse wraps its help to the terminal's width
    text = _HEAD + "".join(_sections(build_parser()))
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _sections(parser: argparse.ArgumentParser, depth: int = 2) -> Iterator[str]:
    yield f"\n{'#' * min(depth, 4)} {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```\n"
    seen: set[int] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            shown = {choice.dest for choice in action._choices_actions}
            for name, command in action.choices.items():
                if name in shown and id(command) not in seen:  # hidden names and aliases are left out
                    seen.add(id(command))
                    yield from _sections(command, depth + 1)
