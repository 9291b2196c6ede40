"""What can be seen of a running snapshotter: an exporter beside it, structured logs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.metrics import snapshotterclient
from obdlab.metrics.exporter import Collected, ObdlabCollector
from obdlab.server import snapshottersocket
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.rundir import host_process
from obdlab.settings.settings import Settings
from obdlab.snapshotter import grpchealth
from obdlab.snapshotter.errors import NotFoundError
from tests.cache.origin import wait_until
from tests.containerd_host import SnapshotterProcess
from tests.snapshotter.wire import WireSnapshotter

LAYER = Path(__file__).parents[1] / "golden" / "ext4" / "layer1.obd"

pytestmark = pytest.mark.kernel


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until_answered(url: str) -> str:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
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
    command = [sys.executable, "-m", "obdlab", "serve", "snapshotter", "--root", str(tmp_path / "root")]
    command += ["--address", str(tmp_path / "s.sock"), "--run-dir", str(run_dir), "--exporter", f"127.0.0.1:{port}"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--log-format", "json", "--log-file", str(tmp_path / "log")]
    command += ["--log-level", "debug"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            assert 'obdlab_devices{state="alive"} 0.0' in until_answered(f"http://127.0.0.1:{port}/metrics")
            assert json.loads(until_answered(f"http://127.0.0.1:{port}/healthz"))["ok"] is True
            assert "is_alive 1.0" in until_answered(f"http://127.0.0.1:{port}/metrics")
            # A host that is still starting would outlive what is cleaned up below.
            wait_until(lambda: host_process(run_dir) is not None)
        finally:
            os.kill(process.pid, end)
        process.wait(60)
    until_refused(port)
    for line in (tmp_path / "log").read_text().splitlines():
        assert json.loads(line).keys() >= {"time", "level", "logger", "pid", "message"}
    clean_up(DeviceService(run_dir, Settings()))


def test_the_service_of_live_snapshots_is_started_by_the_originals_settings(tmp_path: Path) -> None:
    port, run_dir = free_port(), tmp_path / "run"
    settings = tmp_path / "overlaybd.json"
    address = f"http://127.0.0.1:{port}"
    settings.write_text(json.dumps({"serviceConfig": {"enable": True, "address": address}}))
    command = [sys.executable, "-m", "obdlab", "serve", "snapshotter", "--root", str(tmp_path / "root")]
    command += ["--address", str(tmp_path / "s.sock"), "--run-dir", str(run_dir), "--settings", str(settings)]
    command += ["--cache-dir", str(tmp_path / "cache")]
    body = b'{"dev_id": "none", "config": "/none"}'
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while f"listening on {address}" not in (line := process.stderr.readline()):
                assert line, "it ended"
            token = (run_dir / "snapshot-api.token").read_text().strip()
            for given, status in ((token, 404), ("x" * 20, 401)):
                headers = {"Authorization": f"Bearer {given}", "Content-Type": "application/json"}
                request = urllib.request.Request(f"{address}/snapshot", body, headers)
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(request, timeout=30)
                assert caught.value.code == status
                caught.value.close()
            wait_until(lambda: host_process(run_dir) is not None)
        finally:
            process.kill()
        process.wait(60)
    until_refused(port)
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


def test_calls_are_counted_and_health_is_told(tmp_path: Path) -> None:
    process = SnapshotterProcess(tmp_path)
    process.start()
    client = WireSnapshotter(str(process.address))
    client.prepare("key", "", {})
    for _ in range(3):
        with pytest.raises(NotFoundError):
            client.stat("nothing")
    client.prepare("extract", "", {"containerd.io/snapshot.ref": "chain"})
    client.close()
    collector = ObdlabCollector(Collected(process.run_dir, deadline_s=20), tmp_path / "cache")
    served = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in collector.collect()
        for sample in family.samples
    }
    assert served["is_alive",] == 1
    assert served["grpc_latency_seconds_count", "Stat"] == 3
    assert served["grpc_error_count", "Stat"] == 3
    assert served["grpc_error_count", "Prepare"] == 0
    assert served["obdlab_snapshotter_rpc_errors_total", "NOT_FOUND", "Stat"] == 3
    assert served["obdlab_snapshotter_fallbacks_total", "not-overlaybd"] == 1
    assert served["obdlab_snapshotter_snapshots", "active"] == 2
    check_health(process)
    process.start()
    process.stop(signal.SIGKILL)
    assert snapshotterclient.ask_all(process.run_dir, 1.0) == []
    assert list(snapshottersocket.directory_of(process.run_dir).iterdir()) == []
    process.take_down()


def check_health(process: SnapshotterProcess) -> None:
    forms = {
        "request_serializer": StringValue.SerializeToString,
        "response_deserializer": UInt32Value.FromString,
    }
    with grpc.insecure_channel(f"unix:{process.address}", [("grpc.default_authority", "localhost")]) as channel:
        check = channel.unary_unary(f"/{grpchealth.SERVICE}/Check", **forms)
        watch = channel.unary_stream(f"/{grpchealth.SERVICE}/Watch", **forms)
        for service in ("", "containerd.services.snapshots.v1.Snapshots"):
            assert check(StringValue(value=service), timeout=60).value == grpchealth.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(StringValue(value="other"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert next(watch(StringValue(value="other"), timeout=60)).value == grpchealth.SERVICE_UNKNOWN
        states = watch(StringValue(), timeout=60)
        assert next(states).value == grpchealth.SERVING
        (process.root / "snapshots").rename(process.root / "elsewhere")
        assert next(states).value == grpchealth.NOT_SERVING
        (process.root / "elsewhere").rename(process.root / "snapshots")
        assert next(states).value == grpchealth.SERVING
        cache = process.devices.settings.cache_dir
        cache.mkdir(exist_ok=True)
        cache.chmod(0o777)
        assert next(states).value == grpchealth.NOT_SERVING
        cache.chmod(0o755)
        assert next(states).value == grpchealth.SERVING
        assert process.stop() == 0
        assert next(states).value == grpchealth.NOT_SERVING


def test_a_cleanup_takes_dead_sockets_only(tmp_path: Path) -> None:
    directory = snapshottersocket.directory_of(tmp_path)
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "dead.sock"))
    alive = snapshottersocket.Telling(tmp_path, "alive", lambda: {"snapshots": {"view": 1.0}})
    service = DeviceService(tmp_path, Settings(cache_dir=tmp_path / "cache"))
    clean_up(service)
    assert [path.name for path in directory.iterdir()] == ["alive.sock"]
    assert snapshotterclient.ask_all(tmp_path, 20) == [{"snapshots": {"view": 1.0}}]
    alive.close()
    clean_up(service)
    assert not directory.exists()
