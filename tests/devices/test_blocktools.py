"""Block events as the tools that tell of them write them, in the virtual machine: other kernels may be locked."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from obdlab.contrib.traces_extra.blockevents import parse, reads_of
from tests import capabilities
from tests.devices.contract import MIB

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

EVENTS = ("block_bio_queue", "block_rq_issue", "block_rq_complete")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    capabilities.require("blocktools")
    (tmp_path / "disk").write_bytes(os.urandom(4 * MIB))
    command = ["losetup", "--find", "--show", str(tmp_path / "disk")]
    node = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["udevadm", "settle"], check=False, capture_output=True)
    yield node
    subprocess.run(["losetup", "--detach", node], check=True)


def reading(node: str) -> list[str]:
    return ["dd", f"if={node}", "of=/dev/null", "bs=64k", "skip=8", "count=4", "iflag=direct"]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def while_running(command: list[str], ready: Callable[[], bool], node: str) -> str:
    """Run ``command`` from before a few reads of ``node`` until after them; return what it says."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tool:
        deadline = time.monotonic() + 300
        while not ready():
            assert tool.poll() is None, tool.communicate()[0]
            assert time.monotonic() < deadline, f"{command[0]} does not begin"
            time.sleep(0.2)
        run(*reading(node))
        time.sleep(1)
        tool.send_signal(signal.SIGINT)
        return tool.communicate(timeout=120)[0]


def by_trace_cmd(node: str, folder: Path) -> str:
    events = [part for event in EVENTS for part in ("-e", f"block:{event}")]
    run("trace-cmd", "record", *events, "-o", str(folder / "trace.dat"), *reading(node))
    return run("trace-cmd", "report", "-i", str(folder / "trace.dat"))


def by_perf(node: str, folder: Path) -> str:
    events = ",".join(f"block:{event}" for event in EVENTS)
    run("perf", "record", "-e", events, "-a", "-o", str(folder / "perf.data"), "--", *reading(node))
    return run("perf", "script", "-i", str(folder / "perf.data"))


def by_blktrace(node: str, folder: Path) -> str:
    def begun() -> bool:
        return any(folder.glob("x.blktrace.*"))

    while_running(["blktrace", "-d", node, "-D", str(folder), "-o", "x"], begun, node)
    return run("blkparse", "-D", str(folder), "-i", "x")


@pytest.mark.parametrize("tool", [by_trace_cmd, by_perf, by_blktrace])
def test_reads_as_a_tool_tells_them(tool: Callable[[str, Path], str], node: str, tmp_path: Path) -> None:
    text = tool(node, tmp_path)
    number = os.stat(node).st_rdev
    events = parse(text.splitlines())
    reads = [each for each in reads_of(events, (os.major(number), os.minor(number))) if each.offset]
    told = [(each.offset, each.length, each.process) for each in reads]
    assert told == [(offset << 16, 1 << 16, "dd") for offset in range(8, 12)], text[:4000]
    assert all(each.took_s is not None and 0 < each.took_s < 60 for each in reads)
