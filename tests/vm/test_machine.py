"""The machine as its users on the host see it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from tests.capabilities import require
from tests.guard.processes import is_running
from tests.vm import kernel, machine
from tests.vm.kernel import VmError


def _qemus(parent: int) -> list[str]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in children if "qemu" in Path(f"/proc/{pid}/comm").read_text()]


@pytest.mark.slow
def test_status_output_and_shared_files(tmp_path: Path) -> None:
    require("vm")
    share = tmp_path / "share"
    done = machine.run(
        [
            "sh",
            "-c",
            "echo to stdout; echo to stderr >&2; echo $X; cp /etc/os-release /run/vm; touch /etc/new; exit 7",
        ],
        environment={"X": "a 'b'"},
        share=share,
    )
    assert (done.status, done.output) == (7, "to stdout\nto stderr\na 'b'\n")
    assert (share / "os-release").read_bytes() == Path("/etc/os-release").read_bytes()
    assert not Path("/etc/new").exists()
    assert _qemus(os.getpid()) == []


@pytest.mark.slow
def test_a_machine_that_hangs_is_killed() -> None:
    require("vm")
    with pytest.raises(VmError, match="not done after 20 s"):
        machine.run(["sleep", "1000"], timeout_s=20)
    assert _qemus(os.getpid()) == []


@pytest.mark.slow
def test_a_machine_dies_with_its_starter() -> None:
    require("vm")
    starter = subprocess.Popen([sys.executable, "-m", "tests.vm", "run", "--", "sleep", "1000"])
    deadline = time.monotonic() + 60
    while not (found := _qemus(starter.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    starter.kill()
    starter.wait()
    while is_running(int(found[0])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(int(found[0]))


@pytest.mark.slow
def test_a_kernel_panic_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    require("vm")
    seen = panics_at_boot(monkeypatch, 0)
    with pytest.raises(VmError, match="without a status") as caught:
        machine.run(["sh", "-c", "echo c >/proc/sysrq-trigger"], timeout_s=120)
    assert "sysrq" in str(caught.value)
    assert len(seen) == 1  # the command had begun


def panics_at_boot(monkeypatch: pytest.MonkeyPatch, times: int) -> list[list[str]]:
    """Have the machine's first boots fail: its kernel finds no first process. Returns the commands that are run."""
    seen: list[list[str]] = []
    execute = machine._execute

    def first_without_init(argv: list[str], timeout_s: float, echo: IO[str] | None) -> tuple[str, bool]:
        seen.append(argv)
        at = argv.index("-append") + 1
        options = f"{argv[at]} rdinit=/nowhere root=/dev/nothing" if len(seen) <= times else argv[at]
        return execute([*argv[:at], options, *argv[at + 1 :]], timeout_s, echo)

    monkeypatch.setattr(machine, "_execute", first_without_init)
    return seen


@pytest.mark.slow
def test_a_machine_that_dies_at_boot_is_booted_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    require("vm")
    seen = panics_at_boot(monkeypatch, 1)
    done = machine.run(["echo", "here"], timeout_s=240)
    assert (done.status, done.output, len(seen)) == (0, "here\n", 2)
    first, _, _ = done.console.partition("the machine died before the command began")
    assert "Kernel panic" in first


@pytest.mark.slow
def test_a_machine_that_dies_at_boot_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    require("vm")
    seen = panics_at_boot(monkeypatch, 9)
    with pytest.raises(VmError, match="without a status") as caught:
        machine.run(["echo", "here"], timeout_s=240)
    assert len(seen) == 2
    assert str(caught.value).count("Kernel panic - not syncing") == 2


def test_without_a_kernel_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "PACKAGE", "linux-image-of-nobody")
    require("vm")
    with pytest.raises(VmError, match="linux-image-of-nobody"):
        kernel.get_kernel()
