"""Modules that commands do not load: a command's imports are most of its processor time."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each with all that it brings: progress bars, TOML, random numbers, compressions, tables, entry points.
SLOW = ["tqdm", "tomllib", "tempfile", "statistics", "numpy", "zstandard", "pandas", "importlib.metadata"]
SCRIPT = """
import sys
from obdlab.cli.main import main
status = main(sys.argv[1:])
print(status, *(sorted(set(sys.modules) & set({slow}))))
"""


@pytest.mark.parametrize(
    ("command", "kept"),
    [(["image", "pull", "127.0.0.1:1/x:1", "--address", "/nonexistent"], "obdlab.registry.client")],
)
def test_a_pull_loads_what_it_uses(command: list[str], kept: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(slow=[*SLOW, kept]), *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["1", kept], done.stdout + done.stderr


def test_a_pull_that_is_handed_over_loads_nearly_nothing() -> None:
    script = "import sys; old = set(sys.modules); import obdlab.cli.prefork.asking; print(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert {name for name in done.stdout.split() if name.startswith("obdlab")} == {
        "obdlab",
        "obdlab.cli",
        "obdlab.cli.prefork",
        "obdlab.cli.prefork.asking",
        "obdlab.errors",
    }
    assert not {"argparse", "logging", "pathlib", "re", "grpc", "threading"} & set(done.stdout.split())
