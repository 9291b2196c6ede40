"""The ``obdlab`` command: argv to one call. The commands and their groups: obdlab/cli/groups.py."""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from typing import TYPE_CHECKING

from obdlab.cli.groups import GROUPS, SINGLE, Command, Group
from obdlab.cli.oldnames import renamed
from obdlab.cli.reporting import reported
from obdlab.observe.logs import TextFormatter

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH = 100
_INDENT = " " * 6


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser for a command line that starts with these ``words``; of None, for any command line.

    Only the command that ``words`` name gets its arguments, as declaring them imports the command's module.
    """
    named = None if words is None else [word for word in words if not word.startswith("-")][:2]
    parser = argparse.ArgumentParser(
        prog="obdlab", usage="obdlab [-h] [-v] [--version] COMMAND ...", formatter_class=_Map, add_help=False
    )
    parser.description = "Lazily started container images, and the workbench that measures them."
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more (twice: debug)")
    parser.add_argument("--version", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="obdlab")
    _add(commands, (*GROUPS, *SINGLE), named)
    if not named:
        parser.epilog = _map()
    return parser


def _fill(parser: argparse.ArgumentParser, entry: Group | Command, named: Sequence[str] | None) -> None:
    parser.set_defaults(prog=parser.prog)
    if isinstance(entry, Command):
        entry.build(parser)
        return
    if named is None or not entry.has(named[0] if named else ""):
        entry = entry.with_added()
    parser.usage = f"{parser.prog} [-h] COMMAND ..."
    parser.formatter_class = _Map
    parser.description = f"{entry.summary[0].upper()}{entry.summary[1:]}.\n\ncommands:\n{_listed(entry.commands)}"
    parser.epilog = entry.example
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", prog=parser.prog, required=True)
    _add(commands, entry.commands, named)


def _add(
    parsers: argparse._SubParsersAction[argparse.ArgumentParser],
    entries: Sequence[Group | Command],
    named: Sequence[str] | None,
) -> None:
    for entry in entries:
        child = parsers.add_parser(entry.name, help=entry.summary)
        if named is None or named[:1] == [entry.name]:
            _fill(child, entry, None if named is None else named[1:])


def _listed(commands: Sequence[Command]) -> str:
    return "\n".join(f"  {command.name:<13} {command.summary}" for command in commands)


class _Map(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH)

    # Our lists of commands take the place of argparse's, which put long names on lines of their own.
    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action.choices, dict):
            super().add_argument(action)


# The groups with the names of their commands. Fits a screen of 30 lines.
def _map() -> str:
    lines = ["groups (obdlab GROUP --help lists the group's commands and shows an example):"]
    for group in GROUPS:
        lines.append(f"  {group.name:<13} {group.summary}")
        lines += textwrap.wrap(
            " ".join(group.names()),
            _WIDTH,
            initial_indent=_INDENT,
            subsequent_indent=_INDENT,
            break_on_hyphens=False,
        )
    lines.append("commands:")
    return "\n".join([*lines, _listed(SINGLE)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (0 done, 1 failed, 2 bad arguments, 130 interrupted)."""
    words = renamed(sys.argv[1:] if argv is None else argv)
    parser = build_parser(words)
    args = parser.parse_args(words)
    if args.version:
        from importlib.metadata import version

        print(version("obdlab"))
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    return reported(args.prog, lambda: args.run(args), bounded=getattr(args, "bounded", True))


if __name__ == "__main__":
    sys.exit(main())
