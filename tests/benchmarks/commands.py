"""Processor time of short commands before they do anything, beside that of a bare interpreter.

    python -m tests.benchmarks.commands [--rounds 9]

Commands and interpreter alternate; the least of each counts, as the machine can only add to it. ``image pull`` asks
for a containerd that is not there, so that all its imports are done and nothing else. The original's commands
(``obdlab install-tools``) print their help, or commit and merge an empty layer: programs call them once per layer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

START = [sys.executable, "-m", "obdlab"]
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "--version": [*START, "--version"],
    "image pull --help": [*START, "image", "pull", "--help"],
    "image pull": [*START, "image", "pull", "127.0.0.1:1/x:1", "--address", "/nonexistent"],
    "device list": [*START, "device", "list", "--run-dir", "/nonexistent"],
    "import grpc": [sys.executable, "-c", "import grpc"],
    "import numpy": [sys.executable, "-c", "import numpy"],
}
# Without work; the daemons and ctr, which is containerd's without a command of its own, have none.
HELPED = ("create", "commit", "merge", "zfile", "apply", "resize", "tcmu", "snapshotter", "attacher")


def processor_s(command: list[str]) -> float:
    """Run it, and return its processor time, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def installed(place: Path) -> dict[str, list[str]]:
    """Install the original's commands in ``place``, with an empty layer; return command lines by their names."""
    subprocess.run([*START, "install-tools", str(place)], check=True, stdout=subprocess.DEVNULL)
    data, index, layer, config = (str(place / name) for name in ("data", "index", "layer", "config.json"))
    subprocess.run([place / "overlaybd-create", data, index, "1"], check=True, stdout=subprocess.DEVNULL)
    commit = [str(place / "overlaybd-commit"), "-z", "-f", data, index, layer]
    subprocess.run(commit, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    Path(config).write_text(json.dumps({"lowers": [{"file": layer}]}))
    names = [*(f"overlaybd-{name}" for name in HELPED), "turboOCI-apply", "convertor"]
    return {
        **{f"{name} --help": [str(place / name), "--help"] for name in names},
        "overlaybd-commit": commit,
        "overlaybd-merge": [str(place / "overlaybd-merge"), config, f"{layer}.merged"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        commands = COMMANDS | installed(Path(place))
        least = dict.fromkeys(commands, float("inf"))
        for _ in range(args.rounds):
            for name, command in commands.items():
                least[name] = min(least[name], processor_s(command))
    for name, seconds in least.items():
        print(f"{name:28} {seconds * 1000:6.0f} ms  {seconds / least['python']:5.1f} x python")


if __name__ == "__main__":
    main()
