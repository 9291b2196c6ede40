"""The ``obdlab`` command.

Each subcommand is a module of this package with ``add(subcommands)``, which declares its arguments and sets
``run=<function(args) -> exit status>``, and ``bounded=False`` if its memory must have no bound (``memory``): either
its processes have bounds of their own, or it runs other programs, which would inherit the bound. Modules import their
implementation inside that function, so that ``--help`` and shell completion stay fast.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from obdlab.cli.memory import bounded_memory
from obdlab.errors import ObdlabError, interrupt_behind
from obdlab.observe.logs import TextFormatter
from obdlab.observe.printable import printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (
    "convert",
    "convert_list",
    "compare",
    "rpull",
    "snapshotter",
    "fsck",
    "mount",
    "attach",
    "nbd",
    "ls",
    "cat",
    "cp",
    "upgrade",
    "graduate",
    "inspect",
    "pull_blob",
    "verify",
    "diff",
    "create",
    "commit",
    "seal",
    "merge",
    "gc",
    "zfile",
    "import_",
    "resize",
    "snapshot",
    "trace",
    "cache",
    "config",
    "exporter",
    "tcmu",
    "cleanup",
    "experiment",
    "evaluate",
    "dataset",
    "doctor",
)
# Started by other commands; hidden from the help.
_HIDDEN_COMMANDS = ("device_host",)


def build_parser(*, hidden: bool = False) -> argparse.ArgumentParser:
    """Return the parser of the whole command line; ``hidden`` adds the commands that only other commands start."""
    parser = argparse.ArgumentParser(
        prog="obdlab", description="Lazily started container images, and the workbench that measures them."
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more (twice: debug)")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subcommands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS + (_HIDDEN_COMMANDS if hidden else ()):
        importlib.import_module(f"obdlab.cli.{name}").add(subcommands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (0 done, 1 failed, 2 bad arguments, 130 interrupted)."""
    parser = build_parser(hidden="device-host" in (sys.argv[1:] if argv is None else argv))
    args = parser.parse_args(argv)
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
    try:
        with bounded_memory() if getattr(args, "bounded", True) else nullcontext():
            status: int = args.run(args)
        sys.stdout.flush()
    except ObdlabError as error:
        if interrupt_behind(error):  # cleaning up after Ctrl-C failed
            print(f"obdlab {args.command}: interrupted, and then: {printable_lines(str(error))}", file=sys.stderr)
            return 130
        print(f"obdlab {args.command}: {printable_lines(str(error))}{_root_hint(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"obdlab {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has ended
        _drop_output()
        return 141
    except OSError as error:  # such as no room for our output
        logging.getLogger(__name__).debug("%s", error, exc_info=True)
        print(f"obdlab {args.command}: {printable_lines(str(error))}{_root_hint(str(error))}", file=sys.stderr)
        _drop_output()
        return 1
    return status


# Otherwise the interpreter would flush the buffer at its end, and fail again.
def _drop_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _root_hint(message: str) -> str:
    refused = any(os.strerror(number) in message for number in (errno.EACCES, errno.EPERM))
    return " (most commands need root)" if refused and os.geteuid() != 0 else ""


if __name__ == "__main__":
    sys.exit(main())
