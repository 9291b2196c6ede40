"""``obdlab doctor``: what this host can do."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict


def add(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subcommands.add_parser(
        "doctor",
        help="what this host can do, and how to mend what it can't",
        description="Checks kernel features, tools and permissions. Exit status 1 if something needed is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if one that is not optional failed."""
    from obdlab.service.capabilities import run_checks

    checks = run_checks()
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        purpose = ""
        for check in checks:
            if check.purpose != purpose:
                purpose = check.purpose
                print(f"{purpose}:")
            mark = "ok  " if check.ok else "-   " if check.optional else "FAIL"
            fix = "" if check.ok or not check.fix else f"\n         fix: {check.fix}"
            print(f"  {mark} {check.name}: {check.detail}{fix}")
    return int(any(not check.ok and not check.optional for check in checks))
