"""``obdlab doctor``: the abilities of this host."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from obdlab.cli.jsonoutput import add_json_option, print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.cli.host.checks import Check


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Checks kernel features, tools and permissions. Exit status 1 if something needed is missing."
    )
    add_json_option(parser, "print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if one that is not optional failed."""
    from obdlab.cli.host.checks import run_checks

    checks = [*run_checks(), *_baseline_checks()]
    if args.json:
        print_json([asdict(check) for check in checks], indent=2)
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


# Systems that experiments can compare with; obdlab itself never needs them.
def _baseline_checks() -> Iterator[Check]:
    from obdlab.cli.host.checks import Check
    from obdlab.lab.baselines import ADAPTERS
    from obdlab.lab.baselines.adapter import missing_programs

    for name, adapter in ADAPTERS.items():
        missing = missing_programs(adapter)
        versions = adapter.versions().items()
        found = ", ".join(version if program in version else f"{program} {version}" for program, version in versions)
        detail = f"{', '.join(missing)} not found" if missing else found
        fix = "; ".join(dict.fromkeys(missing.values()))
        yield Check("baselines of experiments", name, not missing, detail, fix, optional=True)
