"""Runs of pytest that hang, crash, are killed or leave things, as their users see them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.devices import loop
from tests.server.killing import until

if TYPE_CHECKING:
    from collections.abc import Mapping

_ROOT = Path(__file__).parents[2]
_CONFTEST = """
from tests.guard import plugin
plugin.GRACE_S = 3.0
plugin._END_S = 1.0
pytest_plugins = ["tests.guard.plugin"]
"""
_NEXT = "def test_next(): pass\n"
_PATIENCE_S = 120


def run(directory: Path, body: str, *options: str, **variables: str) -> subprocess.Popen[str]:
    """Start pytest on a file of tests."""
    (directory / "conftest.py").write_text(_CONFTEST)
    (directory / "test_inner.py").write_text(textwrap.dedent(body) + _NEXT)
    (directory / "pytest.ini").write_text("[pytest]\ntimeout = 3\n")
    (directory / "tmp").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-rA", "-p", "no:cacheprovider", "test_inner.py", *options]
    environment = {
        **os.environ,
        "TMPDIR": str(directory / "tmp"),
        "PYTHONPATH": str(_ROOT),
        "COLUMNS": "200",
        **variables,
    }
    return subprocess.Popen(
        command, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(process: subprocess.Popen[str]) -> str:
    with process:
        return process.communicate(timeout=_PATIENCE_S)[0]


def tops(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "tmp").glob("*"))


INTERRUPTED = """
import threading
def test_hangs():
    here_it_waits = threading.Event()
    here_it_waits.wait()
"""
# Its main thread waits for another again, when it is interrupted.
STUBBORN = """
import threading
from concurrent.futures import ThreadPoolExecutor
def never_ends():
    threading.Event().wait()
def test_hangs():
    with ThreadPoolExecutor() as pool:
        pool.submit(never_ends).result()
"""
# Server and client in one process, as in tests of devices.
_SERVED = """
import os, threading
from obdlab.blob import MemoryBlob
from obdlab.devices.fuse import FuseServer
class Silent(MemoryBlob):
    def read_at(self, offset, length, call=None):
        threading.Event().wait()
"""
READS = f"""
{_SERVED}
def test_hangs():
    server = FuseServer(Silent(bytes(1 << 20)))
    os.read(server.open_disk(server.start()), 4096)
"""
# With the interpreter's lock held, which the answering thread needs, and the thread of the alarm.
LOCKED = f"""
import ctypes
{_SERVED}
def test_hangs():
    server = FuseServer(MemoryBlob(bytes(1 << 20)))
    disk = server.open_disk(server.start())
    assert ctypes.PyDLL(None).read(disk, ctypes.create_string_buffer(4096), 4096) == 4096
"""


@pytest.mark.parametrize(
    "body", [pytest.param(INTERRUPTED, id="waits"), pytest.param(READS, id="fuse", marks=pytest.mark.kernel)]
)
def test_a_hanging_test_fails_with_all_stacks(body: str, tmp_path: Path) -> None:
    process = run(tmp_path, body)
    output = finished(process)
    assert process.returncode == 1
    assert "FAILED test_inner.py::test_hangs" in output
    assert "test_inner.py::test_hangs: not done after 3 s (call)" in output
    assert "PASSED test_inner.py::test_next" in output
    assert "here_it_waits.wait()" in output or "threading.Event().wait()" in output
    assert "stacks of all threads when 3 s were over" in output


def test_one_that_cannot_be_interrupted_is_killed_and_the_run_goes_on(tmp_path: Path) -> None:
    process = run(tmp_path, STUBBORN, "-n", "1")
    output = finished(process)
    assert process.returncode == 1
    assert "crashed while running 'test_inner.py::test_hangs'" in output
    assert "PASSED test_inner.py::test_next" in output
    assert "never_ends" in output


@pytest.mark.kernel
def test_a_read_that_holds_the_interpreter_is_freed_and_the_run_goes_on(tmp_path: Path) -> None:
    process = run(tmp_path, LOCKED, "-n", "1")
    output = finished(process)
    assert process.returncode == 1
    assert "FAILED test_inner.py::test_hangs" in output
    assert "PASSED test_inner.py::test_next" in output
    assert "the FUSE connections of its process" in output


LEAVES = """
import json, os, subprocess, sys, time
from pathlib import Path
def test_leaves(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    with_variable = subprocess.Popen(sleep, start_new_session=True)
    by_path = subprocess.Popen([*sleep, f"{tmp_path}/config"], start_new_session=True, env={})
    left = {"pids": [with_variable.pid, by_path.pid], "device": ""}
    if os.environ.get("DEVICES"):
        from obdlab.image.config import ImageConfig, LowerConfig
        from obdlab.settings.settings import Settings
        from obdlab.server.client import DeviceService
        config, service = tmp_path / "config", DeviceService(tmp_path / "run", Settings(cache_dir=tmp_path / "cache"))
        ImageConfig(lowers=(LowerConfig(file=os.environ["DEVICES"]),)).save(config)
        device = service.attach(config)
        (tmp_path / "mnt").mkdir()
        service.mount(device, tmp_path / "mnt")
        left["device"] = str(device.path)
        left["pids"] += [device.pid, device.keeper_pid]
    Path(os.environ["LEFT"]).write_text(json.dumps(left))
    while os.environ.get("STAY"):
        time.sleep(0.1)
"""


def gone(left: Mapping[str, object], directory: Path) -> bool:
    assert isinstance(left["pids"], list)
    running = [pid for pid in left["pids"] if Path(f"/proc/{pid}/cwd").exists()]
    attached = bool(left["device"]) and loop.label_of(Path(str(left["device"]))).startswith("obdlab")
    mounted = str(directory) in Path("/proc/self/mountinfo").read_text()
    return not running and not attached and not mounted


@pytest.mark.parametrize("devices", [False, pytest.param(True, marks=pytest.mark.kernel)])
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_nothing_outlives_a_killed_run(options: tuple[str, ...], devices: bool, tmp_path: Path) -> None:
    layer = str(_ROOT / "tests/golden/ext4/layer1.obd") if devices else ""
    note = tmp_path / "left"
    process = run(tmp_path, LEAVES, "--timeout", "200", *options, LEFT=str(note), STAY="1", DEVICES=layer)
    until(lambda: (note.exists() and note.read_text()) or process.poll() is not None, 60.0)
    left = json.loads(note.read_text())
    assert not gone(left, tmp_path)
    process.send_signal(signal.SIGKILL)
    output = finished(process)  # its end comes when the last process that writes to it is gone
    until(lambda: gone(left, tmp_path) and tops(tmp_path) == [], 60.0)
    assert "died" in output


def test_leftovers_fail_a_run_that_passes(tmp_path: Path) -> None:
    process = run(tmp_path, LEAVES, LEFT=str(tmp_path / "left"))
    output = finished(process)
    assert process.returncode == 1
    assert "left by the tests, and taken down" in output
    assert "2 passed" in output
    assert output.count("time.sleep(1000)") >= 2
    assert gone(json.loads((tmp_path / "left").read_text()), tmp_path)
    assert tops(tmp_path) == []


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_pythons_own_resource_tracker_is_no_leftover(options: tuple[str, ...], tmp_path: Path) -> None:
    body = """
        from multiprocessing import resource_tracker
        def test_starts_it(): resource_tracker.ensure_running()
        """
    process = run(tmp_path, body, *options)
    output = finished(process)
    assert "2 passed" in output
    assert "left by the tests" not in output
    assert process.returncode == 0
    assert tops(tmp_path) == []


def test_temporary_files_stay_for_a_look_when_a_test_fails(tmp_path: Path) -> None:
    body = "def test_fails(tmp_path):\n    (tmp_path / 'a').touch()\n    assert False\n"
    output = finished(run(tmp_path, body))
    (kept,) = (tmp_path / "tmp").glob("*")
    assert f"temporary files, kept until the next run: {kept}" in output
    assert list(kept.glob("t/*/a"))
    assert "1 passed" in finished(run(tmp_path, ""))
    assert tops(tmp_path) == []


def test_what_is_left_with_its_watcher_goes_with_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    for name in ("obdt-over", "obdt-goes-on"):
        (tmp_path / "tmp" / name).mkdir()
        (tmp_path / "tmp" / name / "lock").touch()
    with (tmp_path / "tmp/obdt-goes-on/lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "1 passed" in finished(run(tmp_path, ""))
    assert tops(tmp_path) == ["obdt-goes-on"]
