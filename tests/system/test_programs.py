"""Programs that end with the block that runs them, whenever a signal comes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from obdlab.system.processes import Process
from obdlab.system.programs import ProgramError, run, running

SLEEP = ["sleep", "100"]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Have SIGTERM interrupt this process as SIGINT does, for the test."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_program_ends_with_its_block() -> None:
    with running(SLEEP) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="a bug"), running(SLEEP) as process:
        raise RuntimeError("a bug")
    assert process.returncode == -signal.SIGKILL
    with running(["true"]) as process:
        assert process.wait(60) == 0
    assert process.returncode == 0


def test_a_program_has_no_input_and_its_output_goes_where_it_should(tmp_path: Path) -> None:
    with (
        (tmp_path / "out").open("wb") as out,
        (tmp_path / "err").open("wb") as err,
        running(["sh", "-c", "cat; echo out; echo err >&2"], stdout=out, stderr=err) as process,
    ):
        assert process.wait(60) == 0
    assert ((tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes()) == (b"out\n", b"err\n")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], list[int]]:
    """Have a function called once a program runs and before its start returns; return the programs' numbers."""

    def install(call: Callable[[], None]) -> list[int]:
        numbers: list[int] = []

        class Started(subprocess.Popen[bytes]):
            def __init__(self, *arguments: object, **options: object) -> None:
                super().__init__(*arguments, **options)  # type: ignore[call-overload]
                numbers.append(self.pid)
                call()

        monkeypatch.setattr(subprocess, "Popen", Started)
        return numbers

    return install


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_the_start_ends_the_program(
    number: signal.Signals, started: Callable[[Callable[[], None]], list[int]]
) -> None:
    numbers = started(lambda: os.kill(os.getpid(), number))
    reached = []
    with pytest.raises(KeyboardInterrupt), running(SLEEP):
        reached.append(True)
    assert (len(numbers), reached) == (1, [])
    assert Process.of(numbers[0]) is None
    assert signal.getsignal(number) is signal.default_int_handler


def test_a_failed_start_keeps_the_interrupt_and_the_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError), running(["no-such-program"]):
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt), running(SLEEP):
        pass


def test_an_ignored_signal_stays_ignored_for_the_program() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with running(["sh", "-c", "kill -INT $$; exit 7"]) as process:
            assert process.wait(60) == 7
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_can_run_a_program() -> None:
    codes: list[int | None] = []

    def run() -> None:
        with running(["true"]) as process:
            codes.append(process.wait(60))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert codes == [0]


def test_the_output_of_a_program() -> None:
    assert run(["cat"], 30.0, stdin=b"in") == b"in"
    assert run(["sh", "-c", "echo out; exit 3"], 30.0, fine=(0, 3)) == b"out\n"


@pytest.mark.parametrize(
    ("command", "text", "last"),
    [
        (["sh", "-c", "echo one >&2; echo two >&2; exit 1"], "one\ntwo", "two"),
        (["sh", "-c", "echo said; exit 1"], "said", "said"),
        (["false"], "exit status 1", "exit status 1"),
    ],
)
def test_a_program_that_fails_is_quoted(command: list[str], text: str, last: str) -> None:
    with pytest.raises(ProgramError) as raised:
        run(command, 30.0)
    assert str(raised.value) == text
    assert raised.value.last_line == last


def test_a_missing_program_and_one_that_takes_too_long() -> None:
    with pytest.raises(ProgramError, match="No such file"):
        run(["/nowhere/program"], 30.0)
    with pytest.raises(ProgramError, match="timed out"):
        run(SLEEP, 0.1)
