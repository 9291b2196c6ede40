"""Log options of the commands that run for long."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.numbers import whole
from obdlab.cli.packing import size_argument
from obdlab.observe import logs, stacks
from obdlab.system.ownfiles import own_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.settings.settings import Settings

_LEVELS = ("debug", "info", "warning", "error")


def add_log_options(
    parser: argparse.ArgumentParser, *, default_file: str = "standard error", default_level: str = "info"
) -> None:
    """Add the options; those not given are None. The help names the defaults of the command."""
    group = parser.add_argument_group("logs")
    group.add_argument("--log-format", choices=logs.FORMATS, help="lines of text or of JSON (default: text)")
    group.add_argument("--log-file", type=Path, metavar="FILE", help=f"where to (default: {default_file})")
    group.add_argument(
        "--log-size", type=size_argument, metavar="SIZE", help="a file this large is put aside (default: 10M)"
    )
    group.add_argument(
        "--log-count",
        type=whole(1, 999),
        metavar="N",
        help="so many files are kept, the current one included (default: 3)",
    )
    group.add_argument("--log-level", choices=_LEVELS, help=f"least level that is logged (default: {default_level})")


def log_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as fields of the settings, for the device host that is started with them."""
    given = {
        "log_format": args.log_format,
        "log_path": None if args.log_file is None else args.log_file.absolute(),
        "log_size": args.log_size,
        "log_count": args.log_count,
        "log_level": args.log_level,
    }
    return {name: value for name, value in given.items() if value is not None}


def set_up_logs(
    args: argparse.Namespace, level: int, *, follow: Sequence[int] = (), settings: Settings | None = None
) -> None:
    """Set up logging: options win over the settings. At SIGUSR2 the stacks of all threads are logged.

    Raises OSError if the file cannot be opened, or if root's log would follow a link of another user.
    """
    stacks.dump_on_signal()
    chosen = log_settings(args)
    defaults = logs.LogOptions()
    options = logs.LogOptions(
        format=chosen.get("log_format") or (settings.log_format if settings else defaults.format),
        file=chosen.get("log_path") or (settings.log_path if settings else None),
        size=chosen.get("log_size") or (settings.log_size if settings else defaults.size),
        count=chosen.get("log_count") or (settings.log_count if settings else defaults.count),
    )
    # Another user could have root write elsewhere by a link on the way.
    if options.file is not None and os.geteuid() == 0:
        options = replace(options, file=own_path(options.file))
    name = chosen.get("log_level")
    logs.set_up(options, logging.getLevelNamesMapping()[name.upper()] if name else level, follow=follow)
