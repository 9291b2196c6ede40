"""``obdlab layer create`` and ``resize``: layers, their sizes and their file systems."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import obdlab
from tests.cli.test_layer_tools import run, upper
from tests.layers.golden import LSMT


def test_create_of_a_sparse_layer_makes_the_index_that_configurations_must_name(tmp_path: Path) -> None:
    assert run("create", tmp_path / "a", tmp_path / "b", "--sparse", "--vsize", "1G", "-q") == 0
    assert (tmp_path / "b").read_bytes() == b""
    assert run("create", tmp_path / "c", tmp_path / "b", "--sparse", "--vsize", "1G", "-q") == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_create_refuses_what_contradicts_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("create", tmp_path / "a", "--vsize", "1G") == 1
    assert run("create", tmp_path / "a", "--sparse", "--vsize", "1000") == 1
    for arguments in (["--vsize", "x"], ["--vsize", "-1"], ["--vsize", "1G", "--uuid", "1-2"]):
        with pytest.raises(SystemExit):
            run("create", tmp_path / "a", "--sparse", *arguments)
    assert os.listdir(tmp_path) == []
    assert run("create", tmp_path / "a", "--sparse", "--vsize", "1m", "-q") == 0
    assert run("create", tmp_path / "a", "--sparse", "--vsize", "1m", "-q") == 1
    assert capsys.readouterr().err.count("obdlab layer create: ") >= 5


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["sparse", "append"])
def test_create_with_a_file_system(kind: str, tmp_path: Path) -> None:
    data, index = tmp_path / "data", tmp_path / "index"
    made, flags = (["--sparse"], []) if kind == "sparse" else ([index], [index])
    assert run("create", data, *made, "--vsize", "256M", "--mkfs", "-q") == 0
    assert data.stat().st_blocks * 512 < 1 << 20
    assert run("commit", data, *flags, tmp_path / "layer", "-q") == 0
    with obdlab.open_stack([tmp_path / "layer"]) as disk, (tmp_path / "disk").open("wb") as file:
        file.write(disk.read_at(0, disk.size))
    checked = subprocess.run(["e2fsck", "-fn", tmp_path / "disk"], capture_output=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.kernel
def test_resize_with_its_file_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    assert run("create", data, "--sparse", "--vsize", "64M", "--mkfs", "-q") == 0
    assert run("resize", data, "--vsize", "32M") == 1
    assert "cannot shrink" in capsys.readouterr().err
    assert run("resize", data, "--vsize", "128M", "-q") == 0
    # As on the attached device, which begins at the file's offset 4096.
    for command in (["e2fsck", "-fy"], ["resize2fs"], ["e2fsck", "-fn"]):
        done = subprocess.run([*command, f"{data}?offset=4096"], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
    assert run("commit", data, tmp_path / "layer", "-q") == 0
    with obdlab.open_stack([tmp_path / "layer"]) as disk:
        assert len(disk) == 128 << 20
        blocks = int.from_bytes(disk[1024 + 4 : 1024 + 8], "little")
        assert blocks * 4096 == 128 << 20, "by the superblock"


def test_resize_of_an_append_layer(tmp_path: Path) -> None:
    data, index = upper("l1", tmp_path)
    assert run("resize", data, index, "--vsize", "2M", "-q") == 0
    assert run("commit", data, index, tmp_path / "out", "-q") == 0
    with obdlab.open_stack([tmp_path / "out"]) as disk, obdlab.open_stack([LSMT / "l1.plain.lsmt"]) as before:
        assert disk[:] == before[:] + bytes(1 << 20)
