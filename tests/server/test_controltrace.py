"""Recording a device in use."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.errors import DeviceError
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.view import Disk
from obdlab.layers.lsmt import open_layer
from obdlab.localfile import LocalFile
from obdlab.server.cleanup import clean_up
from obdlab.server.client import AttachedDevice, DeviceService
from obdlab.server.live import LiveDevice
from obdlab.settings.settings import Settings
from tests.devices.contract import read_direct
from tests.image.test_open_remote import EXT4

pytestmark = pytest.mark.kernel


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    made = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache"))
    yield made
    clean_up(made, force=True)


@pytest.fixture
def device(service: DeviceService, tmp_path: Path) -> AttachedDevice:
    config = tmp_path / "config.v1.json"
    ImageConfig(lowers=tuple(LowerConfig(file=str(path)) for path in EXT4)).save(config)
    return service.attach(config, "traced")


def ranges() -> list[tuple[int, int]]:
    with Disk([open_layer(LocalFile(path)) for path in EXT4]) as disk:
        return [(run.begin, run.end) for run in disk.owners() if run.layer is not None and not run.zeroed][:40]


@contextmanager
def being_read(device: AttachedDevice) -> Iterator[None]:
    """Have the device read again and again: how long a command takes to begin recording does not matter then."""
    position, ended = ranges()[0][0] // 4096 * 4096, threading.Event()

    def read() -> None:
        while not ended.wait(0.05):
            read_direct(device.path, position, 4096)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        ended.set()
        reader.join()


def test_recording_begins_and_ends_while_it_is_read(
    service: DeviceService, device: AttachedDevice, tmp_path: Path
) -> None:
    live, wanted = LiveDevice(service, "traced"), ranges()
    read_direct(device.path, 0, 4096)
    with pytest.raises(DeviceError, match="not being recorded"):
        live.stop_recording(tmp_path / "none")
    live.start_recording()
    with pytest.raises(DeviceError, match="already"):
        live.start_recording()
    for begin, _ in wanted:
        read_direct(device.path, begin // 4096 * 4096, 4096)
    done = live.stop_recording(tmp_path / "trace")
    read_direct(device.path, 0, 4096)
    trace = Trace.from_bytes((tmp_path / "trace").read_bytes())
    assert (done.reads, done.size, done.left_out) == (len(trace), trace.size, 0)
    assert len(trace) >= len({begin // 4096 for begin, _ in wanted})
    assert {layer for layer, _, _ in trace.reads()} == {0, 1}
    live.start_recording()  # and again, from nothing
    assert live.stop_recording(tmp_path / "trace").reads == 0
    assert [path.name for path in service.run_dir.device("traced").iterdir() if "noted" in path.name] == []


def test_where_it_cannot_be_written(service: DeviceService, device: AttachedDevice, tmp_path: Path) -> None:
    live = LiveDevice(service, "traced")
    live.start_recording()
    with pytest.raises(DeviceError, match="cannot write"):
        live.stop_recording(tmp_path / "no" / "trace")
    assert device.alive
    live.start_recording()  # the failed one is over
    live.stop_recording(tmp_path / "trace")


def test_the_command(
    service: DeviceService, device: AttachedDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, one = str(service.run_dir.path), tmp_path / "one"
    with being_read(device):
        assert main(["trace", "record", "traced", "-o", str(one), "--seconds", "3", "--run-dir", run_dir, "-q"]) == 0
    assert main(["trace", "show", "--json", str(one)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["reads"] == len(Trace.from_bytes(one.read_bytes())) > 0
    other = tmp_path / "other"
    other.write_bytes(Trace.from_reads([(0, 0, 512)]).to_bytes())
    merged = tmp_path / "merged"
    assert main(["trace", "merge", str(one), str(other), "-o", str(merged)]) == 0
    assert main(["trace", "diff", str(one), str(one)]) == 0
    capsys.readouterr()
    assert main(["trace", "diff", str(other), str(merged)]) == 1
    assert "- layer" not in (printed := capsys.readouterr().out)
    assert printed.startswith("+ layer")
    fits = ["--fits", *map(str, EXT4)]
    assert main(["trace", "filter", str(merged), "--layer", "0", "--first", "1", "-o", str(other), *fits]) == 0
    assert len(Trace.from_bytes(other.read_bytes())) == 1
    assert main(["trace", "record", "nobody", "-o", str(one), "--run-dir", run_dir]) == 1
    assert main(["trace", "show", str(EXT4[0])]) == 1


def test_started_and_stopped_by_commands(
    service: DeviceService, device: AttachedDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, output = ["--run-dir", str(service.run_dir.path)], tmp_path / "trace"
    assert main(["trace", "start", str(device.path), *where]) == 0
    assert main(["trace", "start", "traced", *where]) == 1
    assert re.search(r"being recorded already \(.*obdlab trace stop ends that\)", capsys.readouterr().err)
    read_direct(device.path, ranges()[0][0] // 4096 * 4096, 4096)
    assert main(["trace", "stop", "traced", "-o", str(tmp_path / "none" / "trace"), *where]) == 1
    assert main(["trace", "stop", "traced", "-o", str(output), *where]) == 0
    assert len(Trace.from_bytes(output.read_bytes())) >= 1
    assert main(["trace", "stop", "traced", "-o", str(output), *where]) == 1
    assert main(["trace", "stop", "nobody", "-o", str(output), *where]) == 1
    assert "nobody: no device" in capsys.readouterr().err
    assert main(["trace", "record", "traced", "-o", str(output), *where, "--run"]) == 1
    assert "nothing to run" in capsys.readouterr().err
    # Nothing is written where nothing is left.
    assert main(["trace", "filter", str(output), "--layer", "99", "-o", str(tmp_path / "empty")]) == 1
    assert not (tmp_path / "empty").exists()
    for odd in (["--layer", "-1"], ["--first", "-3"], ["--first", "0"]):
        with pytest.raises(SystemExit):
            main(["trace", "filter", str(output), *odd, "-o", str(tmp_path / "odd")])
    output.write_bytes(output.read_bytes()[:10])
    assert main(["trace", "show", str(output)]) == 1
    assert "cut off (got 10, wanted at least 24 bytes)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # the latter: the terminal is gone
def test_until_a_signal(
    service: DeviceService, device: AttachedDevice, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "trace"
    command = [
        sys.executable,
        "-m",
        "obdlab",
        "trace",
        "record",
        str(device.path),
        "--until-signal",
        "-o",
        str(output),
    ]
    process = subprocess.Popen([*command, "--run-dir", str(service.run_dir.path)])
    mark = service.run_dir.device("traced") / "recording"
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    read_direct(device.path, ranges()[0][0] // 4096 * 4096, 4096)
    os.kill(process.pid, number)
    assert process.wait(60) == 0
    assert len(Trace.from_bytes(output.read_bytes())) >= 1
