"""What can be seen of a running snapshotter: an exporter beside it, structured logs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.settings import Settings
from obdlab.service.cleanup import clean_up
from obdlab.service.client import DeviceService

LAYER = Path(__file__).parents[1] / "golden" / "ext4" / "layer1.obd"

pytestmark = pytest.mark.kernel


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until_answered(url: str) -> str:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return str(response.read().decode())
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def until_refused(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
        except ConnectionRefusedError:
            return
        except OSError:  # just about to end
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_exporter_lives_as_long_as_its_snapshotter(tmp_path: Path, end: signal.Signals) -> None:
    port, run_dir = free_port(), tmp_path / "run"
    command = [sys.executable, "-m", "obdlab", "snapshotter", "--root", str(tmp_path / "root")]
    command += ["--address", str(tmp_path / "s.sock"), "--run-dir", str(run_dir), "--exporter", f"127.0.0.1:{port}"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--log-format", "json", "--log-file", str(tmp_path / "log")]
    command += ["--log-level", "debug"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            assert 'obdlab_devices{state="alive"} 0.0' in until_answered(f"http://127.0.0.1:{port}/metrics")
            assert json.loads(until_answered(f"http://127.0.0.1:{port}/healthz"))["ok"] is True
        finally:
            os.kill(process.pid, end)
        process.wait(60)
    until_refused(port)
    for line in (tmp_path / "log").read_text().splitlines():
        assert json.loads(line).keys() >= {"time", "level", "logger", "pid", "message"}
    clean_up(DeviceService(run_dir, Settings()))


def test_the_host_logs_as_the_snapshotter_was_told(tmp_path: Path) -> None:
    settings = Settings(log_format="json", log_path=tmp_path / "host.json", log_size=1024, log_count=2)
    service = DeviceService(tmp_path / "run", settings)
    config = tmp_path / "config.v1.json"
    ImageConfig(lowers=(LowerConfig(file=str(LAYER)),)).save(config)
    try:
        for number in range(12):
            service.attach(config, f"device{number}")
            service.detach(f"device{number}")
    finally:
        service.stop_host()
        clean_up(service)
    assert {path.name for path in tmp_path.glob("host.json*")} == {"host.json", "host.json.1"}
    for path in tmp_path.glob("host.json*"):
        assert path.stat().st_size < 2048
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            assert entry["level"] == "info"
            assert entry["process"].startswith("device")
