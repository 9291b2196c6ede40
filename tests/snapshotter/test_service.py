"""The socket and the command: who may listen, how it ends, what its configuration may say."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.snapshotter.config import ConfigError, SnapshotterConfig
from obdlab.snapshotter.errors import NotFoundError
from obdlab.snapshotter.service import SnapshotServer, SocketError
from obdlab.snapshotter.writable import Mode
from tests.containerd_host import SnapshotterProcess
from tests.snapshotter.test_core import open_snapshotter
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.snapshotter.core import Snapshotter


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Snapshotter]:
    snapshotter = open_snapshotter(tmp_path)
    yield snapshotter
    snapshotter.close()


@pytest.fixture(autouse=True)
def host_ends(tmp_path: Path) -> Iterator[None]:
    """End the device host that a snapshotter started, and leaves running for the next one."""
    yield
    DeviceService(tmp_path / "run", Settings(cache_dir=tmp_path / "cache")).shutdown(force=True)


def test_only_the_owner_may_connect(core: Snapshotter, tmp_path: Path) -> None:
    address = tmp_path / "new" / "s.sock"
    server = SnapshotServer(core, address)
    assert address.stat().st_mode & 0o777 == 0o600
    assert address.parent.stat().st_mode & 0o777 == 0o700
    server.stop(1.0)


def test_a_dead_servers_socket_is_replaced(core: Snapshotter, tmp_path: Path) -> None:
    address = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(address))
    server = SnapshotServer(core, address)
    server.start()
    client = WireSnapshotter(str(address))
    assert client.walk() == []
    with pytest.raises(SocketError, match="another server"):
        SnapshotServer(core, address)
    assert client.walk() == []
    client.close()
    server.stop(1.0)


@pytest.mark.parametrize("name", ["k" * 20_000, "\u65e5\u672c" * 3000])
def test_errors_of_any_length_arrive(core: Snapshotter, tmp_path: Path, name: str) -> None:
    server = SnapshotServer(core, tmp_path / "s.sock")
    server.start()
    client = WireSnapshotter(str(server.address))
    with pytest.raises(NotFoundError, match=r"does not exist$"):
        client.stat(name)
    client.close()
    server.stop(1.0)


def test_what_is_no_socket_stays(core: Snapshotter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SocketError, match="not a socket"):
        SnapshotServer(core, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(SocketError, match="too long"):
        SnapshotServer(core, tmp_path / ("x" * 108))
    with pytest.raises(SocketError, match="cannot be listened on"):
        SnapshotServer(core, tmp_path / "file" / "s.sock")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_cleanly(tmp_path: Path, number: int) -> None:
    process = SnapshotterProcess(tmp_path)
    process.start()
    client = WireSnapshotter(str(process.address))
    client.prepare("key", "", {})
    client.close()
    assert process.stop(number) == 0
    assert not process.address.exists()
    process.start()
    client = WireSnapshotter(str(process.address))
    assert client.stat("key").key == "key"
    with pytest.raises(NotFoundError, match="'other' does not exist"):
        client.stat("other")
    client.close()
    assert process.stop() == 0


@pytest.mark.slow
def test_a_signal_right_after_the_start_is_not_lost(tmp_path: Path) -> None:
    for _ in range(30):
        process = SnapshotterProcess(tmp_path)
        process.start()
        assert process.stop() == 0


def test_a_second_command_on_the_root_is_refused(tmp_path: Path) -> None:
    process = SnapshotterProcess(tmp_path)
    process.start()
    command = [part if part != str(process.address) else str(tmp_path / "other.sock") for part in process.command()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "another snapshotter uses this root" in done.stderr
    assert not (tmp_path / "other.sock").exists()
    assert process.stop() == 0


def test_a_killed_command_starts_again(tmp_path: Path) -> None:
    process = SnapshotterProcess(tmp_path)
    process.start()
    client = WireSnapshotter(str(process.address))
    client.prepare("key", "", {})
    client.close()
    assert process.stop(signal.SIGKILL) == -signal.SIGKILL
    assert process.address.exists()
    process.start()
    client = WireSnapshotter(str(process.address))
    assert [snapshot.key for snapshot in client.walk()] == ["key"]
    client.close()
    assert process.stop() == 0


def write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_the_originals_configuration_is_understood(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        tmp_path / "config.json",
        {
            "root": "/var/lib/x ",
            "address": "/run/x.sock",
            "verbose": "debug",
            "rwMode": "dir",
            "autoRemoveDev": True,
            "asyncRemove": True,
            "writableLayerType": "sparse",
            "tenant": 3,
            "runtimeType": "docker",
            "rootfsQuota": "20g",
            "logReportCaller": True,
            "turboFsType": ["erofs", "ext4"],
            "mirrorRegistry": [{"host": "a:5000", "insecure": True}, {"host": "b", "insecure": False}],
            "defaultFsType": "erofs",
            "exporterConfig": {"enable": True, "uriPrefix": "/m", "port": 9000},
            "unheardOf": 1,
        },
    )
    config = SnapshotterConfig.load(path)
    assert (config.root, config.address) == (Path("/var/lib/x"), Path("/run/x.sock"))
    assert config.log_level == logging.DEBUG
    assert config.images.plain_http_hosts == {"a:5000"}
    assert config.images.default_fs == "erofs"
    images = config.images
    assert (images.mode, images.sparse, images.auto_remove_devices, images.async_remove) == (
        Mode.DIR,
        True,
        True,
        True,
    )
    assert (config.exporter_listen, config.exporter_path) == ("0.0.0.0:9000", "/m")
    assert images.quota_bytes == 20 << 30
    assert caplog.text.count("not known") == 1
    assert "unheardOf" in caplog.text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rwMode": "block"}, "rwMode"),
        ({"autoRemoveDev": "yes"}, "autoRemoveDev"),
        ({"writableLayerType": "log"}, "writableLayerType"),
        ({"runtimeType": "podman"}, "runtimeType"),
        ({"rootfsQuota": "much"}, "rootfsQuota"),
        ({"tenant": "a"}, "tenant"),
        ({"exporterConfig": {"enable": True, "port": 0}}, "port"),
        ({"exporterConfig": 9863}, "exporterConfig"),
        ({"defaultFsType": "-t"}, "defaultFsType"),
        ({"root": 7}, "root"),
        ({"mirrorRegistry": [{"insecure": True}]}, "mirrorRegistry"),
        ({"mirrorRegistry": "host"}, "mirrorRegistry"),
        ([], "not a JSON object"),
    ],
)
def test_bad_configurations_are_refused(tmp_path: Path, values: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SnapshotterConfig.load(write(tmp_path / "config.json", values))


def test_unreadable_configurations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            SnapshotterConfig.load(tmp_path / name)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    config = write(tmp_path / "config.json", {"root": "/nonexistent/root", "address": "/nonexistent/sock"})
    process = SnapshotterProcess(tmp_path, "--config", str(config))
    process.start()
    assert process.address.is_socket()
    assert process.root.is_dir()
    assert process.stop() == 0
    assert not os.path.exists("/nonexistent")
