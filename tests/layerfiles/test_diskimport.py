"""Disk images as layers: raw ones against their bytes, qcow2 ones as qemu-img makes them."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import obdlab
from obdlab.errors import FormatError
from obdlab.layerfiles import diskimport
from obdlab.layerfiles.diskimport import ImportDiskError, disk_kind, disk_size, import_disk, work_size
from obdlab.layerfiles.rawdisk import RawDisk
from obdlab.layerfiles.writing import Packing
from obdlab.system.newfile import OutputError
from tests import capabilities


def write_disk(path: Path, pieces: list[tuple[int, bytes]], size: int) -> bytes:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, piece in pieces:
            file.seek(offset)
            file.write(piece[: size - offset])
    return path.read_bytes()


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, timeout=60)


def imported(source: Path, tmp_path: Path, kind: str) -> bytes:
    out = tmp_path / "layer"
    import_disk(source, out, Packing(), kind=kind, force=True)
    with obdlab.open_stack([out]) as disk:
        return disk[:]


@given(
    pieces=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40), st.booleans()), max_size=8),
    sectors=st.integers(1, 340),
    seed=st.integers(0, 1 << 30),
)
def test_a_raw_disk_holds_the_blocks_that_are_not_zero(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, int, bool]], sectors: int, seed: int
) -> None:
    source = random.Random(seed)
    path = tmp_path_factory.mktemp("raw") / "disk"
    written = [
        (at * 512, bytes(n * 512) if zero else source.randbytes(n * 512)) for at, n, zero in pieces if at < sectors
    ]
    data = write_disk(path, written, sectors * 512)
    heard: list[int] = []
    disk = RawDisk(path, heard.append)
    try:
        segments = disk.index.segments()
        assert sum(heard) == disk.virtual_size == len(data)
        held = {sector for begin, n, at, _, _ in segments.rows() for sector in range(begin, begin + n) if at == begin}
        blocks = {at // 8 for at in range(sectors) if data[at * 512 : at * 512 + 512].strip(b"\0")}
        assert held == {sector for block in blocks for sector in range(block * 8, min(block * 8 + 8, sectors))}
    finally:
        disk.close()


def test_a_raw_disk_becomes_a_layer_that_reads_the_same(tmp_path: Path) -> None:
    source = tmp_path / "disk"
    data = write_disk(source, [(0, b"boot" * 128), (5 << 20, os.urandom(3_000_000)), (63 << 20, b"end")], 64 << 20)
    assert disk_kind(source) == "raw"
    assert disk_size(source, "raw") == 64 << 20
    assert imported(source, tmp_path, "raw") == data
    assert (tmp_path / "layer").stat().st_size < 3_100_000


def test_sizes_and_outputs_that_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "disk"
    source.write_bytes(bytes(1000))
    with pytest.raises(FormatError, match="disk: disk image is no whole number of sectors"):
        import_disk(source, tmp_path / "layer", Packing(), kind="raw")
    (tmp_path / "layer").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        import_disk(source, tmp_path / "layer", Packing(), kind="raw")


@pytest.mark.parametrize("options", [["-o", "compat=0.10"], ["-o", "compat=1.1"], ["-c"], ["-o", "cluster_size=4k"]])
def test_a_qcow2_disk_reads_as_qemu_reads_it(options: list[str], tmp_path: Path) -> None:
    capabilities.require("qemu")
    raw, image = tmp_path / "raw", tmp_path / "a,b=c.qcow2"
    data = write_disk(raw, [(512, os.urandom(2_000_000)), (30 << 20, b"text " * 100_000)], 32 << 20)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
    assert disk_kind(image) == "qcow2"
    assert disk_size(image, "qcow2") == 32 << 20
    assert imported(image, tmp_path, "qcow2") == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a,b=c.qcow2", "layer", "raw"]


def test_progress_is_heard_of_while_unpacking(tmp_path: Path) -> None:
    capabilities.require("qemu")
    raw, image = tmp_path / "raw", tmp_path / "image.qcow2"
    write_disk(raw, [(512, os.urandom(2_000_000))], 32 << 20)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    heard: list[int] = []
    import_disk(image, tmp_path / "layer", Packing(), kind="qcow2", progress=heard.append)
    assert heard[0] > 0
    assert min(heard) >= 0
    assert sum(heard) == work_size(image, "qcow2") == 64 << 20


def test_qcow2_that_names_other_files_is_refused(tmp_path: Path) -> None:
    capabilities.require("qemu")
    qemu_img("create", "-f", "qcow2", tmp_path / "base", "1M")
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "base", "-F", "qcow2", tmp_path / "child")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'secret'}", tmp_path / "outside", "1M")
    for name, message in (("child", "has a backing file"), ("outside", "external data file")):
        with pytest.raises(FormatError, match=message):
            import_disk(tmp_path / name, tmp_path / "layer", Packing(), kind="qcow2")
    assert not (tmp_path / "layer").exists()


def test_damaged_qcow2(tmp_path: Path) -> None:
    capabilities.require("qemu")
    image = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", image, "1M")
    good = image.read_bytes()
    for data, message in (
        (good[:50], "no qcow2 image"),
        (b"x" * 200, "no qcow2 image"),
        (good[:4] + struct.pack(">I", 4) + good[8:], "unknown qcow2 version"),
    ):
        image.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            disk_size(image, "qcow2")
    image.write_bytes(good[:40] + b"\xff" * 8 + good[48:])  # where the cluster table is
    with pytest.raises(ImportDiskError, match=r"qemu-img failed: .*image"):
        import_disk(image, tmp_path / "layer", Packing(), kind="qcow2")
    assert os.listdir(tmp_path) == ["image"]


def test_a_qcow2_image_that_was_cut_off(tmp_path: Path) -> None:
    capabilities.require("qemu")
    raw, image = tmp_path / "raw", tmp_path / "image"
    write_disk(raw, [(0, os.urandom(2_000_000))], 4 << 20)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    for size in (image.stat().st_size - 512, 1 << 20):
        os.truncate(image, size)
        with pytest.raises(FormatError, match="cut off"):
            import_disk(image, tmp_path / "layer", Packing(), kind="qcow2")
    assert sorted(os.listdir(tmp_path)) == ["image", "raw"]


def test_without_qemu_img_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"QFI\xfb" + struct.pack(">IQIIQ", 2, 0, 0, 16, 1 << 20) + bytes(100))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImportDiskError, match="apt install qemu-utils"):
        import_disk(image, tmp_path / "layer", Packing(), kind="qcow2")
    assert os.listdir(tmp_path) == ["image"]


@pytest.mark.parametrize(
    ("when", "message"), [("check", r"did not end within 0\.3 s"), ("convert", r"wrote nothing for 0\.3 s")]
)
def test_a_qemu_img_that_hangs_is_given_up(
    when: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"QFI\xfb" + struct.pack(">IQIIQ", 2, 0, 0, 16, 1 << 20) + bytes(100))
    tool = tmp_path / "bin" / "qemu-img"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n[ $1 = {when} ] && exec /bin/sleep 100\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    monkeypatch.setattr(diskimport, "STALL_TIMEOUT_S", 0.3)
    with pytest.raises(ImportDiskError, match=message):
        import_disk(image, tmp_path / "layer", Packing(), kind="qcow2")
    assert sorted(os.listdir(tmp_path)) == ["bin", "image"]
