"""What services tell systemd, and the units made for it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.cli import notify
from obdlab.cli.main import main
from tests.capabilities import require

UNITS = sorted((Path(__file__).parents[2] / "packaging" / "systemd").glob("*.service"))


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(60)
        sock.bind(str(tmp_path / "notify"))
        yield sock


def start(tmp_path: Path, *arguments: str | Path, bounded: bool = True) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "obdlab", *map(str, arguments), *places]
    if bounded and os.geteuid() == 0 and shutil.which("setpriv"):
        command = ["setpriv", "--bounding-set=-all", "--no-new-privs", *command]  # as the unit has it
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def test_the_exporter_is_ready_alive_and_stops_without_capabilities(tmp_path: Path, systemd: socket.socket) -> None:
    exporter = start(tmp_path, "serve", "exporter", "--listen", "127.0.0.1:0")
    try:
        assert systemd.recv(4096).split(b"\n") == [b"READY=1", b"MAINPID=%d" % exporter.pid]
        assert [systemd.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        exporter.send_signal(signal.SIGTERM)
        assert exporter.wait(60) == 0
    finally:
        exporter.kill()
        exporter.wait(60)
    systemd.setblocking(False)
    told = []
    while not told or told[-1] != b"STOPPING=1":
        told.append(systemd.recv(4096))
    assert set(told) <= {b"WATCHDOG=1", b"STOPPING=1"}


@pytest.mark.kernel
def test_the_snapshotter_is_ready_alive_and_stops(tmp_path: Path, systemd: socket.socket) -> None:
    require("kernel")
    address = tmp_path / "snapshotter.sock"
    snapshotter = start(
        tmp_path, "serve", "snapshotter", "--root", tmp_path / "root", "--address", address, bounded=False
    )
    try:
        assert systemd.recv(4096).split(b"\n")[0] == b"READY=1"
        assert address.is_socket()
        assert systemd.recv(4096) == b"WATCHDOG=1"
        snapshotter.send_signal(signal.SIGTERM)
        while systemd.recv(4096) == b"WATCHDOG=1":
            pass
        assert snapshotter.wait(60) == 0
    finally:
        snapshotter.kill()
        snapshotter.wait(60)
        assert main(["cleanup", "--run-dir", str(tmp_path / "run")]) == 0


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "words"), [("run", "{}: cannot make the run directory: "), ("cache", "cache directory {}: ")]
)
def test_a_snapshotter_whose_directory_is_refused_is_never_ready(
    name: str, words: str, tmp_path: Path, systemd: socket.socket
) -> None:
    require("kernel")
    address, refused = tmp_path / "snapshotter.sock", tmp_path / name
    refused.mkdir()
    refused.chmod(0o1777)
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    command = [
        sys.executable,
        "-m",
        "obdlab",
        "serve",
        "snapshotter",
        "--root",
        tmp_path / "root",
        "--address",
        address,
    ]
    command += ["--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"obdlab serve snapshotter: {words.format(refused)}")
    assert "mode 1777" in line
    assert not (tmp_path / "root").exists()
    assert not address.exists()
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(4096)


def test_nobody_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    assert not notify.notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "wanted"),
    [
        ("3000000", "", 3.0),
        ("3000000", "own", 3.0),
        ("3000000", "1", None),
        ("0", "", None),
        ("x", "", None),
        ("", "", None),
    ],
)
def test_watchdog(usec: str, pid: str, wanted: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert notify.watchdog_s() == wanted


@pytest.mark.tools("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_valid(unit: Path, tmp_path: Path) -> None:
    obdlab = shutil.which("true")
    (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/local/bin/obdlab", str(obdlab)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_stopping_the_snapshotter_spares_the_device_servers() -> None:
    (unit,) = (unit.read_text() for unit in UNITS if unit.name == "obdlab-snapshotter.service")
    assert "\nKillMode=process\n" in unit
    for namespaced in ("ProtectSystem", "PrivateTmp", "PrivateMounts", "ProtectHome", "PrivateDevices"):
        assert f"\n{namespaced}=" not in unit
