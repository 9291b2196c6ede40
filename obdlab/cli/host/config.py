"""``obdlab config``: the settings that result from a settings file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.jsonoutput import add_json_option, print_json

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = "Settings files: obdlab's own keys, or overlaybd.json (docs/reference/configuration.md)."
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    check = verbs.add_parser(
        "check",
        help="check a file and show the effective settings",
        description=(
            "Checks a settings file and shows the resulting settings, those that differ from their default marked. "
            "Keys without effect are reported on standard error. The exit status is 1 if the file cannot be used."
        ),
    )
    check.add_argument("file", type=Path, metavar="FILE")
    add_json_option(check, "print the settings as a file that --settings takes")
    check.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Print the settings; the notes go to standard error."""
    import sys
    from dataclasses import fields, replace

    from obdlab.plain import to_plain
    from obdlab.settings.original import load
    from obdlab.settings.settings import Settings

    loaded = load(args.file)
    for note in loaded.notes:
        print(note, file=sys.stderr)
    settings, default = replace(loaded.settings, settings_path=None), Settings()
    if args.json:
        print_json(json.loads(settings.to_json()), indent=2)
        return 0
    for field in fields(Settings):
        if field.name == "settings_path":  # the file's own path is no setting
            continue
        value = getattr(settings, field.name)
        mark = "*" if value != getattr(default, field.name) else " "
        print(f"{mark} {field.name} = {json.dumps(to_plain(value))}")
    return 0
