"""``obdlab serve nbd`` with qemu's tools as its clients."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from obdlab.cli.main import main
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import open_image, open_stack
from obdlab.layers.upper import SparseUpper
from obdlab.settings.settings import Settings
from tests.capabilities import require
from tests.layers.golden import GOLDEN

LAYERS = [GOLDEN / "lsmt" / name for name in ("l1.lz4.lsmt", "l2.lz4.lsmt")]


@contextmanager
def served(tmp_path: Path, *arguments: str | Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "obdlab", "serve", "nbd", *map(str, arguments), *places]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("obdlab nbd: ready on nbd"), line
        yield line.split()[-1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def qemu() -> None:
    require("qemu")


@pytest.fixture
def decoded(tmp_path: Path) -> Path:
    path = tmp_path / "decoded.raw"
    with open_stack(LAYERS) as disk:
        path.write_bytes(disk[:])
    return path


@pytest.mark.usefixtures("qemu")
@pytest.mark.parametrize("listen", [False, True])
def test_qemu_reads_an_image(tmp_path: Path, decoded: Path, listen: bool) -> None:
    place = ["--listen", "127.0.0.1:0"] if listen else ["--socket", tmp_path / "nbd.sock"]
    with served(tmp_path, *LAYERS, *place, "--name", "a name") as uri:
        assert urlsplit(uri).path == "/a%20name"
        assert "Images are identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, decoded)
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == decoded.read_bytes()
        stretches = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
        assert sum(stretch["length"] for stretch in stretches) == decoded.stat().st_size
        assert {stretch["data"] for stretch in stretches} == {True, False}, "holes are told"
        refused = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 4k", uri], capture_output=True, text=True, timeout=60, check=False
        )
        assert refused.returncode != 0
    assert not (tmp_path / "run").exists(), "nothing is left of an export"


@pytest.mark.usefixtures("qemu")
def test_qemu_writes_an_image(tmp_path: Path, decoded: Path) -> None:
    size = decoded.stat().st_size
    SparseUpper.create(tmp_path / "upper", size).close()
    (tmp_path / "upper.index").touch()
    lowers = tuple(LowerConfig(file=str(path)) for path in LAYERS)
    upper = UpperConfig(data=str(tmp_path / "upper"), index=str(tmp_path / "upper.index"))
    config = ImageConfig(lowers=lowers, upper=upper)
    config.save(tmp_path / "config.v1.json")
    steps, model, chance = [], bytearray(decoded.read_bytes()), random.Random(3)
    for number in range(1, 40):
        at = chance.randrange(size // 512) * 512
        length = min(512 * chance.randint(1, 200), size - at)
        kind = chance.choice(["write", "write -z", "discard", "write -f"])
        if kind in ("write", "write -f"):
            steps.append(f"{kind} -P {number} {at} {length}")
            model[at : at + length] = bytes([number]) * length
        else:
            steps.append(f"{kind} {at} {length}")
            model[at : at + length] = bytes(length)
    decoded.write_bytes(model)
    arguments = [argument for step in [*steps, "flush"] for argument in ("-c", step)]
    with served(tmp_path, tmp_path / "config.v1.json", "--socket", tmp_path / "nbd.sock") as uri:
        run("qemu-io", "-f", "raw", "-d", "unmap", *arguments, uri)
        assert "Images are identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, decoded)
    with served(tmp_path, tmp_path / "config.v1.json", "--socket", tmp_path / "nbd.sock", "--read-only") as uri:
        assert "Images are identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, decoded)
    with open_image(config, Settings()) as image:
        assert image.read_at(0, size) == model


@pytest.mark.usefixtures("qemu")
def test_qemu_formats_and_fills_a_fresh_image(tmp_path: Path, decoded: Path) -> None:
    SparseUpper.create(tmp_path / "upper", decoded.stat().st_size).close()
    (tmp_path / "upper.index").touch()
    upper = UpperConfig(data=str(tmp_path / "upper"), index=str(tmp_path / "upper.index"))
    ImageConfig(upper=upper).save(tmp_path / "config.v1.json")
    with served(tmp_path, tmp_path / "config.v1.json", "--socket", tmp_path / "nbd.sock") as uri:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", decoded, uri)
        assert "Images are identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, decoded)


def test_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(60)
        systemd.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with served(tmp_path, *LAYERS, "--socket", tmp_path / "nbd.sock", environment=environment):
            assert systemd.recv(4096).split(b"\n")[0] == b"READY=1"
        assert systemd.recv(4096) == b"STOPPING=1"


def test_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["serve", "nbd", str(tmp_path / "none.obd"), "--socket", str(tmp_path / "s"), *places]) == 1
    assert f"{tmp_path}/none.obd: no such layer file" in capsys.readouterr().err
    (tmp_path / "s").write_text("mine")
    assert main(["serve", "nbd", *map(str, LAYERS), "--socket", str(tmp_path / "s"), *places]) == 1
    assert f"cannot listen on {tmp_path}/s: there is a file that is no socket" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "nbd", str(LAYERS[0]), "--listen", "9", *places])
    assert "wanted ADDRESS:PORT" in capsys.readouterr().err
