"""Processor time of short commands before they do anything, beside that of a bare interpreter.

    python -m tests.benchmarks.commands [--rounds 9]

Commands and interpreter alternate; the least of each counts, as the machine can only add to it. ``image pull`` asks
for a containerd that is not there, so that all its imports are done and nothing else.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

START = [sys.executable, "-m", "obdlab"]
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "--version": [*START, "--version"],
    "image pull --help": [*START, "image", "pull", "--help"],
    "image pull": [*START, "image", "pull", "127.0.0.1:1/x:1", "--address", "/nonexistent"],
    "device list": [*START, "device", "list", "--run-dir", "/nonexistent"],
    "import grpc": [sys.executable, "-c", "import grpc"],
}


def processor_s(command: list[str]) -> float:
    """Run it, and return its processor time, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    least = dict.fromkeys(COMMANDS, float("inf"))
    for _ in range(args.rounds):
        for name, command in COMMANDS.items():
            least[name] = min(least[name], processor_s(command))
    for name, seconds in least.items():
        print(f"{name:20} {seconds * 1000:6.0f} ms  {seconds / least['python']:5.1f} x python")


if __name__ == "__main__":
    main()
