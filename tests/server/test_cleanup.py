"""What cleaning up a run directory leaves alone: other people's files, and a snapshotter that runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings


@pytest.mark.parametrize("force", [False, True])
def test_a_live_socket_is_named_and_left_and_a_dead_one_goes(tmp_path: Path, *, force: bool) -> None:
    service = DeviceService(tmp_path, Settings())
    service.run_dir.create()
    live, dead = tmp_path / "snapshotter.sock", tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as ended:
        ended.bind(str(dead))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(live))
        listener.listen()
        report = clean_up(service, force=force)
        assert report.in_use == [f"a snapshotter is still running on {live} (pid {os.getpid()})"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(live))
    assert clean_up(service).in_use == []
    assert list(tmp_path.iterdir()) == []


def test_a_socket_that_is_too_busy_to_answer_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obdlab.server.cleanup._PROBE_TIMEOUT_S", 0.05)
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))  # nobody accepts it, and the queue is full
        (line,) = clean_up(DeviceService(tmp_path, Settings())).in_use
        assert f"{path} (pid unknown: " in line
    assert path.exists()


def test_only_what_is_obdlabs_is_removed(tmp_path: Path) -> None:
    service = DeviceService(tmp_path, Settings())
    service.run_dir.create()
    for name in ("host.log", "host.lock", "host.pid", "notes.txt"):
        (tmp_path / name).write_text("1")
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    assert clean_up(service).in_use == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "snapshots"]
    assert (tmp_path / "snapshots" / "1").is_dir()
