"""Conversions that must fail: a clear error, nothing at the destination, nothing left on the machine."""

from __future__ import annotations

import gzip
import json
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.apply import ApplyError
from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.errors import CorruptBlobError, FormatError, ObdlabError
from obdlab.registry.errors import RegistryError
from tests.convert.converting import convert
from tests.convert.layouts import (
    CONFIG,
    LAYER,
    MANIFEST,
    Layout,
    Member,
    digest_of,
    hardlink,
    make_layout,
    member,
    symlink,
    tar_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.registry.server import RegistryServer

pytestmark = pytest.mark.kernel

GOOD = [member("good", b"x")]


def refused(layout: Path, work_dir: Path, kind: type[ObdlabError], **layer: int) -> ObdlabError:
    """Convert, which must fail, and leave the destination without an image."""
    out = work_dir.parent / "out"
    with pytest.raises(kind) as caught:
        convert(
            str(layout),
            f"oci:{out}:latest",
            ConvertOptions(work_dir=work_dir, layer=LayerOptions(**layer)),
        )
    assert not out.exists() or ImageLayout(out).index().manifests == ()
    return caught.value


def layout_with(root: Path, blobs: Sequence[bytes], diff_ids: Sequence[str], media_type: str) -> Layout:
    layout = Layout(root)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": list(diff_ids)}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": layout.add_json(config, CONFIG),
        "layers": [layout.add_blob(blob, media_type) for blob in blobs],
    }
    layout.write_index([layout.add_json(manifest, MANIFEST)])
    return layout


@pytest.mark.parametrize("name", ["../escape", "a/../../escape", "/../escape"])
def test_name_that_leads_out(name: str, work_dir: Path, tmp_path: Path) -> None:
    make_layout(tmp_path / "source", [GOOD, [member("fine", b"x"), member(name, b"x")]])
    error = refused(tmp_path / "source", work_dir, FormatError)
    assert isinstance(error, FormatError)
    assert "layer 1 (sha256:" in str(error)
    assert f"member '{name}': name leads out of the layer's root" in str(error)
    assert error.offset == 1024


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (hardlink("link", "../../etc/passwd"), "hard link target leads out"),
        (hardlink("link", "absent"), "hard link to a file that does not exist"),
        (hardlink("link", "/etc/hostname"), "hard link to a file that does not exist"),
        (member(".wh..", b""), "malformed whiteout"),
        (member("file/below", b""), "a parent is not a directory|Not a directory"),
        (member("x" * 300, b""), "File name too long"),
        (member("odd", kind=b"Z"), "unknown type"),
    ],
)
def test_member_that_makes_no_sense(bad: Member, what: str, work_dir: Path, tmp_path: Path) -> None:
    make_layout(tmp_path / "source", [[member("file", b"x"), bad]])
    error = refused(tmp_path / "source", work_dir, FormatError)
    assert any(part in str(error) for part in what.split("|")), error


def test_links_out_of_the_tree_stay_inside(work_dir: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    climb = "../" * 40
    layers = [
        [symlink("absolute", str(victim)), symlink("climbing", climb + str(victim)[1:]), symlink("proc", "/proc")],
        [member("absolute/a", b"x"), member("climbing/b", b"x"), member("proc/self/root/c", b"x")],
        [
            symlink("again", str(victim)),
            member("again/d", b"x"),
            symlink("up", climb + str(victim)[1:]),
            member("up/e", b"x"),
            member("up/.wh..wh..opq"),
        ],
    ]
    make_layout(tmp_path / "source", layers)
    convert(str(tmp_path / "source"), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=work_dir))
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_truncated_gzip(keep: float, work_dir: Path, tmp_path: Path) -> None:
    # The blob is what its digest says, but the gzip stream in it ends early.
    tar = tar_bytes([member("random", random.Random(1).randbytes(300_000))])
    blob = gzip.compress(tar)
    layout_with(tmp_path / "source", [blob[: int(len(blob) * keep)]], [digest_of(tar)], LAYER + "+gzip")
    error = refused(tmp_path / "source", work_dir, FormatError)
    assert "gzip data ends early" in str(error)


def test_truncated_tar(work_dir: Path, tmp_path: Path) -> None:
    tar = tar_bytes([member("file", b"x" * 10_000)])[:5000]
    layout_with(tmp_path / "source", [tar], [digest_of(tar)], LAYER)
    error = refused(tmp_path / "source", work_dir, FormatError)
    assert "tar ends inside a file" in str(error)


def test_no_tar_at_all(work_dir: Path, tmp_path: Path) -> None:
    data = b"this is no tar, only text " * 100
    layout_with(tmp_path / "source", [data], [digest_of(data)], LAYER)
    assert "not a tar or a damaged one" in str(refused(tmp_path / "source", work_dir, FormatError))


def test_layer_that_the_config_does_not_name(work_dir: Path, tmp_path: Path) -> None:
    layout_with(tmp_path / "source", [tar_bytes(GOOD)], [digest_of(b"another")], LAYER)
    error = refused(tmp_path / "source", work_dir, CorruptBlobError)
    assert "not the one that the image config names" in str(error)


@pytest.mark.parametrize("how", ["gzip", "zstd", "plain"])
def test_flipped_bit(how: str, work_dir: Path, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "source", [GOOD, [member("file", b"x" * 100_000)]], how=how)
    manifest = ImageLayout(layout.root).select(None)[0]
    layer = ImageLayout(layout.root).read_blob(manifest, 1 << 20)
    path = layout.blob_path(json.loads(layer)["layers"][1]["digest"])
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    error = refused(tmp_path / "source", work_dir, FormatError)
    assert "layer 1" in str(error) or path.name in str(error)


def test_missing_and_short_blobs(work_dir: Path, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "source", [GOOD])
    (blob,) = [path for path in (layout.root / "blobs" / "sha256").iterdir() if path.read_bytes()[:2] == b"\x1f\x8b"]
    blob.write_bytes(blob.read_bytes()[:-1])
    assert "wrong size" in str(refused(layout.root, work_dir, CorruptBlobError))
    blob.unlink()
    assert blob.name in str(refused(layout.root, work_dir, ObdlabError))


def test_file_system_too_small(work_dir: Path, tmp_path: Path) -> None:
    make_layout(tmp_path / "source", [[member("big", b"x" * (40 << 20))]])
    error = refused(tmp_path / "source", work_dir, ApplyError, virtual_size=32 << 20)
    assert "cannot make file 'big'" in str(error)
    assert "full" in str(error)


def test_bomb(work_dir: Path, tmp_path: Path) -> None:
    # 256 MiB of zeros in 256 KB of gzip, announced as one file.
    info = tarfile.TarInfo("zeros")
    info.size = 256 << 20
    chunk, compressor = bytes(1 << 20), zlib.compressobj(9, wbits=31)
    blob = compressor.compress(info.tobuf())
    for _ in range(256):
        blob += compressor.compress(chunk)
    blob += compressor.flush()
    layout_with(tmp_path / "source", [blob], [digest_of(b"never reached")], LAYER + "+gzip")
    assert "full" in str(refused(tmp_path / "source", work_dir, ApplyError, virtual_size=64 << 20))


@contextmanager
def small_disk(path: Path, size_mib: int) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_disk_below_is_full(tmp_path: Path) -> None:
    make_layout(tmp_path / "source", [[member("big", random.Random(2).randbytes(40 << 20))]], how="plain")
    with small_disk(tmp_path / "small", 24) as disk:
        error = refused(tmp_path / "source", disk, ObdlabError)
        assert list(disk.iterdir()) == []
    assert "No space left on device" in str(error)


@pytest.mark.registry
def test_registry_without_the_image(work_dir: Path, registry_server: RegistryServer, tmp_path: Path) -> None:
    source = f"{registry_server.host}/convert/absent:v1"
    with pytest.raises(RegistryError, match="convert/absent:v1"):
        convert(source, f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=work_dir))


def test_destination_that_does_not_answer(work_dir: Path, tmp_path: Path) -> None:
    make_layout(tmp_path / "source", [[member(name, b"x" * 1000)] for name in "abc"])
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        destination = f"127.0.0.1:{silent.getsockname()[1]}/x:v1"
        with pytest.raises(RegistryError, match="x@sha256:"):
            convert(str(tmp_path / "source"), destination, ConvertOptions(work_dir=work_dir), deadline_s=6.0)


def command(tmp_path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "obdlab", "image", "convert", *arguments, "--work-dir", str(tmp_path / "work")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_by_a_signal(number: int, work_dir: Path, tmp_path: Path) -> None:
    layout = slow_layout(tmp_path)
    process = subprocess.Popen(
        command(tmp_path, str(layout), f"oci:{tmp_path / 'out'}"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    with process:
        wait_for_building(process, work_dir)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().strip().splitlines()[-1] == "obdlab image convert: interrupted"
    assert not (tmp_path / "out").exists() or ImageLayout(tmp_path / "out").index().manifests == ()


def slow_layout(tmp_path: Path) -> Path:
    """A layer that takes a while: many files, plain."""
    members = [member(f"{number % 100}/{number}", b"x" * 5000) for number in range(20_000)]
    return make_layout(tmp_path / "source", [members], how="plain").root


def wait_for_building(process: subprocess.Popen[bytes], work: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if list(work.glob("*/*.writable")):
            return
        time.sleep(0.01)
    raise AssertionError("no layer was begun")
