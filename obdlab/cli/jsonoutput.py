"""``--json``, the same for every command: JSON is then all that the command prints on standard output.

An answer is one value, unless the command's help says one object a line. Progress and warnings go to standard error.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from obdlab.observe.printable import printable_lines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


def add_json_option(parser: argparse._ActionsContainer, shape: str = "print the result as one JSON object") -> None:
    """Add the option; ``shape`` is its help."""
    parser.add_argument("--json", action="store_true", help=shape)


def print_json(value: object, *, indent: int | None = None) -> None:
    """Print a value on standard output."""
    print(json.dumps(value, indent=indent))


def answer(args: argparse.Namespace, facts: Mapping[str, object], *lines: str) -> None:
    """Print the result of a command: its lines, or with --json an object; ``--quiet`` leaves out the lines."""
    if args.json:
        print_json(facts)
    elif not getattr(args, "quiet", False):
        for line in lines:
            print(printable_lines(line))


def report(args: argparse.Namespace, text: str, facts: Mapping[str, object]) -> None:
    """Print the summary of a command: one line on standard error, or with --json an object on standard output."""
    if args.json:
        print_json(facts)
    else:
        say(text, quiet=args.quiet)


def say(text: str, *, quiet: bool) -> None:
    """Print one line of summary on standard error."""
    if not quiet:
        print(printable_lines(text), file=sys.stderr)
