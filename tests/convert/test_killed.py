"""A conversion that is killed: its processes go with it."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.system.processes import Process
from tests.convert.layouts import make_layout, member
from tests.server.killing import until

# More than is compressed without a process of its own, and enough to be at work for a while.
_SIZE = 24 << 20


def _children(pid: int) -> list[Process]:
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    found = [Process.of(int(child)) for children in lists for child in children]
    return [process for process in found if process is not None]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_conversion(number: signal.Signals, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "source", [[member("a", random.Random(1).randbytes(_SIZE))]])
    command = [
        sys.executable,
        "-m",
        "obdlab",
        "image",
        "convert",
        str(layout.root),
        f"oci:{tmp_path / 'out'}",
        "--quiet",
    ]
    (tmp_path / "work").mkdir()
    with subprocess.Popen([*command, "--work-dir", str(tmp_path / "work")], stderr=subprocess.DEVNULL) as process:
        # The compressing process, and multiprocessing's resource tracker.
        until(lambda: len(_children(process.pid)) == 2 or process.poll() is not None)
        children = _children(process.pid)
        process.send_signal(number)
        assert process.wait(30) != 0
    assert len(children) == 2
    until(lambda: not any(child.alive for child in children))
