"""Runs of pytest whose virtual machine does not come up, as their users see them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_CONFTEST = """
from tests.vm import machine

def run(*args, **options):
    raise machine.VmError("the machine did not come up")

machine.run, machine.missing, machine.in_guest = run, lambda: "", lambda: False
pytest_plugins = ["tests.vm.plugin"]
"""
_TESTS = """
import pytest

@pytest.mark.vm
def test_in_the_machine(): pass

def test_here(): pass
"""
_PATIENCE_S = 120


@pytest.mark.parametrize("workers", [0, 1])
def test_a_test_that_the_machine_did_not_report_fails_alone(tmp_path: Path, workers: int) -> None:
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    (tmp_path / "test_inner.py").write_text(_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", str(workers), "test_inner.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "COLUMNS": "200"},
        text=True,
        capture_output=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_inner.py::test_in_the_machine" in done.stdout
    assert "the machine did not come up" in done.stdout
    assert "INTERNALERROR" not in done.stdout
