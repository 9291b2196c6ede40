"""Run a benchmark and keep what it printed as a row: ``python -m tests.benchmarks.keep [--times N] NAME [ARGUMENT]``.

Rows go to ``experiments/measured/benchmarks/NAME.jsonl``, with commit, host and load; ``make figures`` writes their
medians into the pages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from obdlab.lab.testbed import environment

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "experiments" / "measured" / "benchmarks"
_FACTS = ("git_commit", "git_dirty", "kernel", "cpu_model", "cores", "memory_bytes", "disk_file_system", "python")


def main() -> int:
    """Append a row for each run; return the status of a benchmark that failed, which leaves no row."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.keep", description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="runs (default: 1)")
    parser.add_argument("name")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    for _ in range(args.times):
        facts = environment.capture()
        row = {
            "arguments": args.arguments,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "load_1m": round(os.getloadavg()[0], 2),
            **{key: facts[key] for key in _FACTS},
        }
        command = [sys.executable, "-m", f"tests.benchmarks.{args.name}", *args.arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            return done.returncode
        row["printed"] = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
        PLACE.mkdir(parents=True, exist_ok=True)
        with (PLACE / f"{args.name}.jsonl").open("a") as file:
            file.write(json.dumps(row, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
