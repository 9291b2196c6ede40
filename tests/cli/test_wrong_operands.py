"""What commands say of operands of the wrong kind: one line, naming it, and never status 0."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.formats.trace import Trace
from tests.layers.golden import GOLDEN, LSMT

LAYER = GOLDEN / "ext4" / "layer1.obd"


@pytest.fixture
def operands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello world\nthis is text\n")
    (tmp_path / "json").write_text('{"a": 1}')
    (tmp_path / "random").write_bytes(bytes((i * 7919 + (i >> 3)) % 251 for i in range(100_000)))
    (tmp_path / "trace").write_bytes(Trace.from_reads([(0, 0, 4096), (0, 8192, 4096)]).to_bytes())
    (tmp_path / "layer").write_bytes(LAYER.read_bytes())
    (tmp_path / "zfile").write_bytes((GOLDEN / "zfile" / "text.lz4.4.zfile").read_bytes())
    return tmp_path


# Each with "{}" for the operand, and the kinds of operand that it does take.
COMMANDS = {
    "image inspect {}": "layer zfile",
    "image verify {}": "layer",
    "layer diff --old layer --new {}": "layer",
    "layer commit {} out": "layer",
    "layer seal {}": "",
    "layer merge {} layer -o out": "layer",
    "layer gc {} --run-dir run": "",
    "layer resize {} --vsize 1G --run-dir run": "",
    "layer zfile compress {} out": "empty text json random trace layer zfile",
    "layer zfile extract {} out": "layer zfile",
    "layer zfile verify {}": "layer zfile",
    "trace show {}": "trace",
    "trace merge {} -o out": "trace",
    "trace diff {} trace": "trace",
    "trace filter {} -o out": "trace",
    "trace import {} layer -o out": "",
    "trace timeline {} layer": "",
    "trace files {} layer": "trace",
    "image ls {}:/": "layer",
    "image cat {}:/one": "layer",
    "image cp {}:/ copied": "layer",
    "config check {}": "",
    "image convert {} oci:out": "",
    "image convert oci:{} oci:out": "",
    "image convert oci-archive:{} oci:out": "",
    "image convert docker-archive:{} oci:out": "",
    "image compare {} layer": "layer",
    "image inspect oci:{}": "",
    "image pull-blob {}": "",
    "fsck {}": "",
}
KINDS = ("missing", "directory", "empty", "text", "json", "random", "trace", "layer", "zfile")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("operands")
def test_one_line_says_what_is_wrong(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        if kind in COMMANDS[command].split():
            continue
        operand = f"./{kind}"
        if command.startswith(("image ls", "image cat", "image cp")) and kind == "directory":
            operand = str(LSMT)
        status = main(command.format(operand).split())
        captured = capfd.readouterr()
        assert status == 1, (command, kind, captured)
        assert len(captured.err.splitlines()) == 1, (command, kind, captured.err)
        assert captured.err.isprintable() or captured.err.rstrip("\n").isprintable(), (command, kind)
        assert len(captured.err) < 500
        assert not Path("out").is_file()


@pytest.mark.usefixtures("operands")
def test_a_trace_is_no_events_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("timeline trace layer", "import trace layer -o out"):
        assert main(["trace", *command.split()]) == 1
        assert "trace: a trace (wanted block events, as obdlab trace watch writes" in capsys.readouterr().err
    assert main(["trace", "timeline", "random", "layer"]) == 1
    assert "(got binary data, wanted lines of tracefs" in capsys.readouterr().err


@pytest.mark.usefixtures("operands")
def test_files_that_are_no_images_are_not_asked_of_docker_hub(capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (
        ("layer", "a file"),
        ("directory", "a directory, but no OCI layout"),
        ("./x", "no such directory"),
    ):
        for arguments in (
            ["image", "convert", name, "oci:out"],
            ["image", "compare", name, "oci:x"] if name != "layer" else ["image", "pull-blob", name],
            ["image", "pull-blob", name],
        ):
            assert main(arguments) == 1
            assert (
                f"{name}: {kind}, and not the name of an image (wanted HOST/NAME:TAG, oci:DIR"
                in capsys.readouterr().err
            )


@pytest.mark.parametrize(
    "command", [["image", "inspect", str(LAYER)], ["config", "check", "/dev/stdin"], ["image", "ls", f"{LAYER}:/"]]
)
def test_output_that_finds_no_room_is_an_error(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "obdlab", *command],
            input=b'{"device_kind": "auto"}',
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line == f"obdlab {' '.join(word for word in command[:2] if word != 'check')}: [Errno 28] {os.strerror(28)}"
