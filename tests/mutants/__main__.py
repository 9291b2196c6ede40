"""Mutation testing of one room or of all.

    python -m tests.mutants map [--host]           which tests run which lines (once; --host: those with devices too)
    python -m tests.mutants run formats layers     change lines, run the tests that ran them, write down what survived
    python -m tests.mutants run --top-up cache     as many further mutants as the page's row of the room lacks
    python -m tests.mutants report                 scores (docs/develop/mutants.md) and survivors (survivors.md here)

A mutant is caught when one of the tests that run its line fails or does not end in time. Results go to
results/mutants/ROOM.jsonl and are kept: a second run goes on where the first was, unless the file has changed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.mutants import report, running
from tests.mutants.sample import ROOMS

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    mapping = commands.add_parser("map")
    mapping.add_argument("--host", action="store_true", help="with the tests that use devices and containers")
    mapping.add_argument("tests", nargs="*", default=["tests"])
    run = commands.add_parser("run")
    run.add_argument("rooms", nargs="*")
    run.add_argument("--seed", type=int, default=1)
    run.add_argument("--count", type=int, default=200)
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--again", action="store_true", help="try survivors again")
    run.add_argument("--top-up", action="store_true", help="as many as the rows of the page lack, of today's code")
    commands.add_parser("report").add_argument("--write", action="store_true", help="into their files")
    arguments = parser.parse_args()
    try:
        if arguments.command == "map":
            return running.record(ROOT, arguments.tests, host=arguments.host)
        if arguments.command == "run" and arguments.top_up:
            for room in arguments.rooms or ROOMS:
                missing = report.missing_of(room, ROOT)
                running.top_up(ROOT, room, missing, workers=arguments.workers, again=arguments.again)
            return 0
        if arguments.command == "run":
            return running.run(
                ROOT, arguments.rooms, **{k: vars(arguments)[k] for k in ("seed", "count", "workers", "again")}
            )
        return report.main(ROOT, write=arguments.write)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
