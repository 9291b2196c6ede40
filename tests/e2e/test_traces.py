"""A start recorded in a container of its own, published with the image, and what the next start gains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from obdlab.formats.trace import Trace
from obdlab.system import mount
from obdlab.traces.sets import difference
from tests.e2e.conftest import BIG
from tests.e2e.images import push_converted
from tests.registry.server import RegistryServer, running_registry

pytestmark = [pytest.mark.kernel, pytest.mark.containerd, pytest.mark.registry]

START = "cat /big >/dev/null; echo half; echo READY; exec sleep 100"


class Tool:
    """The command line, with directories of its own."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run"
        self._directory = directory
        self._caches = 0

    def __call__(self, *words: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "obdlab", *words, "--run-dir", str(self.run_dir)]
        if words[0] in ("trace", "device", "image"):
            command[3 : 3 + len(words)] = [*words[:2], *self._cache(), *words[2:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    def _cache(self) -> list[str]:
        return ["--cache-dir", str(self._directory / f"cache-{self._caches}")]

    def forget_cached(self) -> None:
        self._caches += 1


@pytest.fixture(scope="module")
def image(registry_server: RegistryServer, layers: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """One of its own: others are not to be helped by a trace that refers to theirs."""
    return push_converted(registry_server.host, "e2e/traced", layers, tmp_path_factory.mktemp("convert"))


@pytest.fixture
def tool(tmp_path: Path) -> object:
    made = Tool(tmp_path.resolve())
    yield made
    made("cleanup", "--force")


def devices(tool: Tool) -> list[dict[str, object]]:
    return [json.loads(line) for line in tool("device", "list", "--json").splitlines()]


def test_from_a_recording_to_a_start_ahead_of_its_reads(tool: Tool, image: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    words = ["trace", "record", image, "-o", str(trace), "--seconds", "60", "--until-line", "READY"]
    told = tool(*words, "--run-dir", str(tool.run_dir), "--run", "/bin/sh", "-c", START)
    assert "half\nREADY\n" in told
    assert "(ready)" in told
    assert Trace.from_bytes(trace.read_bytes()).size > len(BIG)
    assert devices(tool) == []
    assert mount.mounts_at(tmp_path) == []
    assert not [entry for entry in mount.mounts() if str(tool.run_dir) in str(entry.mountpoint)]

    hot = f"{image.rpartition(':')[0]}:hot"
    assert "hot layer of" in tool("image", "publish", image, hot, "--trace", str(trace))
    tool("image", "publish", image, "--trace", str(trace), "--as", "referrer")
    for name in (hot, image):
        tool.forget_cached()
        tool("device", "mount", name, str(tmp_path / "mnt"))
        (device,) = devices(tool)
        assert (tmp_path / "mnt" / "big").read_bytes() == BIG
        (device,) = devices(tool)
        counted = device["source"]
        assert isinstance(counted, dict)
        assert counted["prefetch_used_bytes"] > len(BIG) * 0.8, (name, counted)
        tool("device", "umount", str(tmp_path / "mnt"))


def test_a_command_says_when_it_is_ready_or_how_it_ended(tool: Tool, image: str, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "trace"), "--run-dir", str(tool.run_dir)]
    until = ["--until-command", "test -e /tmp/ready"]
    script = "echo $$; ls /proc/self/ns >/dev/null; sleep 1; >/tmp/ready; sleep 100"
    assert "(ready)" in tool("trace", "record", image, *out, *until, "--run", "/bin/sh", "-c", script)
    assert "status 7" in tool("trace", "record", image, *out, "--run", "/bin/sh", "-c", "exit 7", status=1)
    assert "its command has ended" in tool("trace", "record", image, *out, "--run", "/bin/sh", "-c", "exit 0")
    assert "no-such" in tool("trace", "record", image, *out, "--run", "/no-such", status=1)
    # The bound on the command's own memory is not the container's.
    script = "grep -q '^Max data size *unlimited *unlimited' /proc/self/limits"
    assert "its command has ended" in tool("trace", "record", image, *out, "--run", "/bin/sh", "-c", script)
    assert devices(tool) == []


def test_never_ready_is_a_failure_but_the_trace_is_there(tool: Tool, image: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    out = ["-o", str(trace), "--run-dir", str(tool.run_dir), "--seconds", "2"]
    for until in (["--until-line", "NEVER"], ["--until-command", "false"]):
        trace.unlink(missing_ok=True)
        run = ["--run", "/bin/sh", "-c", "echo x; sleep 100"]
        assert "never ready (2 s)" in tool("trace", "record", image, *out, *until, *run, status=1)
        assert Trace.from_bytes(trace.read_bytes()).size > 0
    assert "never ready (its command" in tool(
        "trace", "record", image, *out, "--until-line", "NEVER", "--run", "/bin/sh", "-c", "exit 0", status=1
    )
    assert devices(tool) == []


def recording(tool: Tool, image: str, trace: Path, script: str) -> subprocess.Popen[str]:
    """Begin to record the script."""
    words = ["trace", "record", image, "-o", str(trace), "--run-dir", str(tool.run_dir)]
    words += ["--cache-dir", str(trace.parent / "cache"), "--seconds", "100", "--run", "/bin/sh", "-c", script]
    return subprocess.Popen([sys.executable, "-m", "obdlab", *words], stderr=subprocess.PIPE, text=True)


@contextmanager
def silent(registry: RegistryServer) -> Iterator[None]:
    """A registry that accepts connections and says nothing."""
    os.kill(registry.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(registry.pid, signal.SIGCONT)


def ended_within(process: subprocess.Popen[str], seconds: float) -> str:
    """End it by SIGTERM, and return what it told."""
    began = time.monotonic()
    process.terminate()
    _, told = process.communicate(timeout=120)
    assert time.monotonic() - began < seconds
    return told


def begun(tool: Tool, image: str, trace: Path, script: str) -> subprocess.Popen[str]:
    """Begin to record the script; returns once it has printed GO."""
    process = recording(tool, image, trace, script)
    assert process.stderr is not None
    while "GO" not in (line := process.stderr.readline()):
        assert line, process.wait()
    return process


def test_the_container_does_not_outlive_a_killed_recorder(tool: Tool, image: str, tmp_path: Path) -> None:
    process = begun(tool, image, tmp_path / "trace", "echo GO; exec sleep 4711")
    deadline = time.monotonic() + 60
    while not running("sleep 4711"):
        assert time.monotonic() < deadline, "the container's command did not start"
        time.sleep(0.05)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while running("sleep 4711") or list(tool.run_dir.glob("record-*/container/state/*")):
        assert time.monotonic() < deadline, "the container goes on"
        time.sleep(0.1)
    time.sleep(1.5)  # the guard's last deed
    assert "removed device" in tool("cleanup")
    assert not [entry for entry in mount.mounts() if str(tool.run_dir) in str(entry.mountpoint)]
    assert not list(tool.run_dir.glob("record-*"))


def test_cleanup_takes_nothing_from_a_start_that_goes_on(tool: Tool, image: str, tmp_path: Path) -> None:
    process = begun(tool, image, tmp_path / "trace", "echo GO; exec sleep 4713")
    assert f"pid {process.pid}; SIGINT ends it" in tool("cleanup", status=1)
    assert process.poll() is None
    told = tool("cleanup", "--force")
    assert f"(pid {process.pid})" in told
    process.communicate(timeout=60)
    assert process.returncode == 0  # ended in good order
    assert Trace.from_bytes((tmp_path / "trace").read_bytes()).size > 0
    assert not running("sleep 4713")
    assert not list(tool.run_dir.glob("record-*"))


def running(command: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if path.read_bytes().replace(b"\0", b" ").strip() == command.encode():
                return True
    return False


def test_a_registry_that_falls_silent_holds_nobody(tool: Tool, layers: list[bytes], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with running_registry(tmp_path / "own") as registry:
        own = push_converted(registry.host, "e2e/silent", layers, tmp_path)
        process = begun(tool, own, trace, "echo GO; sleep 1; cat /big >/dev/null")
        with silent(registry):
            time.sleep(2)  # the container reads now
            told = ended_within(process, 60)
    assert process.returncode == 0, told
    assert Trace.from_bytes(trace.read_bytes()).size > 0
    assert devices(tool) == []
    assert not [entry for entry in mount.mounts() if str(tool.run_dir) in str(entry.mountpoint)]


def test_nor_one_that_is_silent_before_the_start(tool: Tool, layers: list[bytes], tmp_path: Path) -> None:
    with running_registry(tmp_path / "own") as registry:
        own = push_converted(registry.host, "e2e/silent", layers, tmp_path)
        with silent(registry):
            process = recording(tool, own, tmp_path / "trace", "exec sleep 4712")
            time.sleep(3)
            told = ended_within(process, 60)
    assert process.returncode == 130
    assert "interrupted" in told
    assert not running("sleep 4712")
    assert not (tmp_path / "trace").exists()


def test_what_cannot_be_recorded_is_told(tool: Tool, image: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "none" / "trace")
    assert "no directory" in tool("trace", "record", image, "-o", missing, status=1)
    here = str(tmp_path / "trace")
    assert "is a directory" in tool("trace", "record", image, "-o", str(tmp_path), status=1)
    assert "is a directory" in tool("trace", "record", image, "-o", here, "--events", str(tmp_path), status=1)
    assert "named twice" in tool("trace", "record", image, "-o", here, "--events", here, status=1)
    assert "/dev/loop999: no device" in tool("trace", "record", "/dev/loop999", "-o", here, status=1)
    assert "404" in tool("trace", "record", image + "x", "-o", here, status=1)
    assert devices(tool) == []


def test_a_start_is_watched_and_explained(tool: Tool, image: str, tmp_path: Path) -> None:
    trace, events = tmp_path / "trace", tmp_path / "events"
    words = ["-o", str(trace), "--events", str(events), "--until-line", "READY"]
    run = ["--run-dir", str(tool.run_dir), "--run", "/bin/sh", "-c", START]
    tool("trace", "record", image, *words, *run)
    told = tool("trace", "timeline", str(events), image, "--rate-mbit", "100")
    assert "/big" in told
    assert "at 100 Mbit/s and 0 ms takes at least" in told
    imported = tmp_path / "imported"
    tool("trace", "import", str(events), image, "-o", str(imported))
    recorded, made = (Trace.from_bytes(path.read_bytes()) for path in (trace, imported))
    # The kernel has asked for all that was read of the layers, but for their indexes.
    assert sum(end - begin for _, begin, end in difference(recorded, made)) < recorded.size * 0.05
    tool.forget_cached()
    again = ["-o", str(events), "--trace", str(imported), "--until-line", "READY"]
    assert "block events (ready)" in tool("trace", "watch", image, *again, *run)
    explained = json.loads(
        tool("trace", "timeline", str(events), image, "--trace", str(imported), "--json").splitlines()[-1]
    )
    assert explained["summary"]["coverage"] > 0.9
    assert {step["process"] for step in explained["steps"]} >= {"cat"}
    assert devices(tool) == []
    assert "no directory" in tool("trace", "watch", image, "-o", str(tmp_path / "none" / "x"), status=1)
