"""``obdlab completion``: scripts that complete the command line in bash, zsh and fish."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names of arguments that are paths although their type is not: an image may also be a file.
_FILES = ("DATA", "DISK", "DST", "INDEX", "LAYER", "NAME", "OUTPUT", "SOURCE", "SRC", "DEVICE|IMAGE", "IMAGE")
_DIRECTORIES = ("DIR", "ROOT")
SHELLS = ("bash", "zsh", "fish")
_DESCRIPTION = """\
Prints a script with which a shell completes commands, options, their choices, and paths. The script holds all of
them: completing starts no program.

  bash   obdlab completion bash >/etc/bash_completion.d/obdlab
         (for one user: ~/.local/share/bash-completion/completions/obdlab)
  zsh    obdlab completion zsh >/usr/local/share/zsh/site-functions/_obdlab
  fish   obdlab completion fish >/etc/fish/completions/obdlab.fish
         (for one user: ~/.config/fish/completions/obdlab.fish)"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from obdlab.cli.main import build_parser

    parser = build_parser()
    for action in _actions(parser):
        if (isinstance(action.type, type) and issubclass(action.type, Path)) or action.metavar in _FILES:
            action.complete = shtab.DIRECTORY if action.metavar in _DIRECTORIES else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


# Those of the parser and of all its commands. argparse lists them nowhere else.
def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action.choices, dict):
            for child in action.choices.values():
                yield from _actions(child)
        else:
            yield action
