"""The entry of every installed tool: its name to its table, and errors to the original's exit status."""

from __future__ import annotations

import gc
import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from obdlab.cli.dropin.grammar import Style, Tool, UsageError
from obdlab.cli.dropin.originals import TOOLS
from obdlab.cli.reporting import reported
from obdlab.observe.printable import printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

# Collecting garbage while modules are imported is a fifth of a commit's processor time, and finds none.
_GARBAGE = 100_000


def main(name: str, words: Sequence[str] | None = None) -> int:
    """Run the original's command ``name`` with these words (default: the process's); return its exit status."""
    module, _, table = TOOLS[name][1].partition(":")
    tool = getattr(import_module(f"obdlab.cli.dropin.{module}"), table)
    if not tool.service:
        gc.set_threshold(_GARBAGE)
    return run(tool, sys.argv[1:] if words is None else words)


def run(tool: Tool, words: Sequence[str]) -> int:
    """Parse a command line and run the tool; return its exit status. Raises SystemExit(0) after ``--help``."""

    try:
        values = tool.parse(words)
    except UsageError as error:
        if tool.style is Style.CLI11:
            print(f"{printable_lines(str(error))}\nRun with --help for more information.", file=sys.stderr)
        else:
            print(f"Error: {printable_lines(str(error))}", file=sys.stderr)
        return error.status
    logging.basicConfig(level=logging.DEBUG if getattr(values, "verbose", False) else logging.WARNING)
    return reported(tool.name, lambda: tool.run(values), bounded=not tool.service, failed=tool.failed)
