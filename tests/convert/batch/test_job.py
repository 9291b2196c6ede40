"""One conversion process: what becomes of its answer, its failure and its death."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from obdlab.convert.batch import job
from obdlab.convert.batch.job import LENGTH_BYTES, Job, Outcome, run_job

ANSWERING = f"""
import sys
from obdlab.convert.batch.job import Outcome
length = int.from_bytes(sys.stdin.buffer.read({LENGTH_BYTES}), "big")
payload = sys.stdin.buffer.read(length)
sys.stdout.buffer.write(Outcome(digest=payload.decode(), layers=length, size=7).to_line())
"""
FAILING = "import sys; print('first line', file=sys.stderr); print('the reason', file=sys.stderr); sys.exit(3)"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module that a job may run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return tmp_path / "module_of_a_job.py"


def run(module: Path, text: str, **options: object) -> Outcome:
    module.write_text(text)
    return run_job(Job(module.stem, b"sha256:1", **options), lambda: False)  # type: ignore[arg-type]


def test_the_answer_comes_back(module: Path) -> None:
    outcome = run(module, ANSWERING)
    assert (outcome.digest, outcome.layers, outcome.size) == ("sha256:1", 8, 7)
    assert (outcome.error, outcome.temporary) == ("", False)
    assert outcome.host
    assert outcome.seconds > 0


def test_a_failure_is_its_last_line_and_stays_one(module: Path) -> None:
    outcome = run(module, FAILING)
    assert outcome.error == "the conversion process ended with status 3: the reason"
    assert not outcome.temporary
    assert (outcome.digest, outcome.layers, outcome.source_size, outcome.size) == ("", 0, 0, 0)
    assert "ended with status 0" in run(module, "print('no outcome')").error


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV"), (signal.SIGRTMIN + 3, "37")]
)
def test_a_killed_process_may_fare_better_next_time(module: Path, number: int, name: str) -> None:
    outcome = run(module, f"import os; os.kill(os.getpid(), {int(number)})")
    assert outcome.error == f"the conversion process was killed ({name})"
    assert outcome.temporary


def test_it_is_stopped_when_its_run_is(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_END_S", 0.1)  # it does not look at its input, and is killed
    module.write_text("import time; time.sleep(600)")
    started = time.monotonic()
    outcome = run_job(Job(module.stem, b""), lambda: True)
    assert (outcome.error, outcome.temporary) == ("stopped", True)
    assert time.monotonic() - started < 300


def test_without_a_module_there_is_a_reason() -> None:
    outcome = run_job(Job("no_such_module_of_a_job", b"x" * 1_000_000), lambda: False)
    assert "No module named" in outcome.error
    assert not outcome.temporary
