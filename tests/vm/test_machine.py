"""The machine as its users on the host see it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.capabilities import require
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
    while Path(f"/proc/{found[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{found[0]}").exists()


@pytest.mark.slow
def test_a_kernel_panic_is_told() -> None:
    require("vm")
    with pytest.raises(VmError, match="without a status") as caught:
        machine.run(["sh", "-c", "echo c >/proc/sysrq-trigger"], timeout_s=120)
    assert "sysrq" in str(caught.value)


def test_without_a_kernel_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "PACKAGE", "linux-image-of-nobody")
    require("vm")
    with pytest.raises(VmError, match="linux-image-of-nobody"):
        kernel.get_kernel()
