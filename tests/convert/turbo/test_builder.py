"""Warp layers made of ordinary ones: every tree reads as the tars say, and nothing wrong passes the comparison."""

from __future__ import annotations

import gzip
import io
import subprocess
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.convert.apply import apply_layer
from obdlab.convert.compare.listing import TreeEntry, differences, list_volume
from obdlab.convert.endpoints.layout import VerifiedFile
from obdlab.convert.layer import LayerOptions
from obdlab.convert.tree.memorytree import MemoryTree
from obdlab.convert.turbo.builder import TurboBuilder, TurboFiles, TurboVerificationError
from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.oci import OCI_LAYER, Descriptor, digest_of
from obdlab.image.open import open_warp
from obdlab.layers.stack import Stack
from obdlab.layers.warp import WarpLayer
from obdlab.volumes.erofs.volume import Volume as ErofsVolume
from obdlab.volumes.ext4.volume import Volume as Ext4Volume
from tests.convert.images import whole_image
from tests.convert.layouts import compress, directory, hardlink, member, tar_bytes
from tests.convert.torture import gnu_only_layer
from tests.layers.golden import TURBO, target_tar

FILESYSTEMS = ("ext4", "erofs")
VOLUMES = {"ext4": Ext4Volume, "erofs": ErofsVolume}
OPTIONS = LayerOptions(virtual_size=1 << 30)


def source_file(directory: Path, tar: bytes, blob: bytes = b"") -> VerifiedFile:
    path, blob = directory / digest_of(tar)[7:], blob or tar
    path.write_bytes(blob)
    return VerifiedFile(path, Descriptor(OCI_LAYER, digest_of(blob), len(blob)))


def add(builder: TurboBuilder, directory: Path, tar: bytes, diff_id: str = "", *, blob: bytes = b"") -> TurboFiles:
    with closing(source_file(directory, tar, blob)) as file:
        return builder.add(file, "image", diff_id or digest_of(tar))


def build(
    directory: Path, tars: Sequence[bytes], filesystems: Sequence[str] = FILESYSTEMS, *, how: str = ""
) -> list[TurboFiles]:
    directory.mkdir()
    with TurboBuilder(directory, OPTIONS, filesystems) as builder:
        made = [add(builder, directory, tar, blob=compress(tar, how)) for tar in tars]
        builder.verify()
    return made


def opened(made: Sequence[TurboFiles], tars: Sequence[bytes], filesystem: str, directory: Path) -> Stack:
    return Stack(
        [
            layer
            for files, tar in zip(made, tars, strict=True)
            for layer in open_warp(
                files.files[f"{filesystem}.fs.meta"], directory / digest_of(tar)[7:], files.files.get("gzip.meta")
            ).layers
        ]
    )


def listing_of(tars: Sequence[bytes]) -> dict[str, TreeEntry]:
    tree = MemoryTree()
    for tar in tars:
        apply_layer(io.BytesIO(tar), "layer", tree)
    return tree.listing()


def odd_padding() -> bytes:
    # The bytes behind a file's end are not zeros, as no rule says that they are.
    tar = bytearray(tar_bytes([member("odd", b"o" * 700), member("even", b"e" * 1024), member("last", b"l" * 5001)]))
    at = tar.index(b"o" * 700)
    tar[at + 700 : at + 1024] = b"\xff" * 324
    at = tar.index(b"l" * 5001)
    tar[at + 5001 : at + 5120] = b"\xee" * 119
    return bytes(tar)


def reused_blocks() -> list[bytes]:
    # The second layer's files take blocks of the first one's, whose bytes must not show behind their ends.
    return [
        tar_bytes([directory("d"), *(member(f"d/{n}", bytes([n + 1]) * 9000) for n in range(40))]),
        tar_bytes([member(".wh.d"), *(member(f"{n}", b"n" * (100 + n * 300)) for n in range(40))]),
        tar_bytes([member("3", b"again" * 2000), member("4", b""), hardlink("five", "5"), member("5", b"new")]),
    ]


IMAGES = {
    "whole": [tar_bytes(members) for members in whole_image()],
    "odd padding": [odd_padding()],
    "reused blocks": reused_blocks(),
    "sparse": [gnu_only_layer()],
    "twice in a layer": [tar_bytes([member("a", b"1" * 6000), member("a", b"2" * 3000), member("b", b"3" * 6000)])],
    "golden chain": [target_tar(name)[:] for name in ("l1", "l2", "l3")],
}


@pytest.fixture(params=IMAGES)
def tars(request: pytest.FixtureRequest) -> list[bytes]:
    return IMAGES[request.param]


@pytest.mark.parametrize("how", ["plain", "gzip"])
def test_each_depth_reads_as_the_tars_say(tmp_path: Path, tars: list[bytes], how: str) -> None:
    made = build(tmp_path / "work", tars, how=how)
    for filesystem, volume in VOLUMES.items():
        for depth in range(1, len(tars) + 1):
            with opened(made[:depth], tars[:depth], filesystem, tmp_path / "work") as stack:
                assert differences(list_volume(volume(stack)), listing_of(tars[:depth])) == []
        if filesystem == "ext4":
            with opened(made, tars, filesystem, tmp_path / "work") as stack:
                check_ext4(stack, tmp_path / "disk")


def check_ext4(stack: Stack, path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(stack.size)
        for offset, length, _, zeroed, _ in stack.index.segments().rows():
            if not zeroed:
                file.seek(offset * 512)
                file.write(stack.read_at(offset * 512, length * 512))
    done = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_same_layers_give_the_same_bytes(tmp_path: Path) -> None:
    tars = IMAGES["whole"]
    first, second = (build(tmp_path / name, tars) for name in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        assert {name: path.read_bytes() for name, path in one.files.items()} == {
            name: path.read_bytes() for name, path in other.files.items()
        }


def test_contents_stay_in_the_target(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    tars = [tar_bytes([member("large", content), *(member(f"s{n}", content[n : n + 3000]) for n in range(200))])]
    (made,) = build(tmp_path / "work", tars)
    assert list(made.files) == ["ext4.fs.meta", "erofs.fs.meta", ".turbo.ociv1", "tar.sums"]
    for filesystem in FILESYSTEMS:
        assert made.files[f"{filesystem}.fs.meta"].stat().st_size < 30_000
        with opened([made], tars, filesystem, tmp_path / "work") as stack:
            (layer,) = stack.layers
            assert isinstance(layer, WarpLayer)
            assert layer.file.size < 500_000


def test_a_layer_that_reads_wrong_is_not_published(tmp_path: Path) -> None:
    # The target changes behind the builder's back, as a wrong record or a wrong index would change what is read.
    tar = tar_bytes([member("a", b"a" * 5000), member("b", b"b" * 5000)])
    with TurboBuilder(tmp_path, OPTIONS, FILESYSTEMS) as builder:
        add(builder, tmp_path, tar)
        builder.verify()
        with (tmp_path / digest_of(tar)[7:]).open("r+b") as target:
            target.seek(tar.index(b"b" * 5000) + 4999)
            target.write(b"x")
        with pytest.raises(TurboVerificationError, match="ext4 differs from the image: b: sha256 differs"):
            builder.verify()


def test_another_layer_than_the_config_names(tmp_path: Path) -> None:
    tar = tar_bytes([member("a", b"a")])
    with TurboBuilder(tmp_path, OPTIONS, ("ext4",)) as builder, pytest.raises(CorruptBlobError, match="image config"):
        add(builder, tmp_path, tar, digest_of(b""))


@pytest.mark.parametrize("cut", [100, 700])
def test_a_tar_that_ends_inside_a_file(tmp_path: Path, cut: int) -> None:
    tar = tar_bytes([member("a", b"a" * 1000)])[: 512 + cut]
    with (
        TurboBuilder(tmp_path, OPTIONS, ("ext4",)) as builder,
        pytest.raises(FormatError, match="ends inside a file"),
    ):
        add(builder, tmp_path, tar)


def test_the_index_is_the_originals(tmp_path: Path) -> None:
    with TurboBuilder(tmp_path, OPTIONS, ("ext4",)) as builder:
        for name in ("l1", "l2", "l3"):
            blob = (TURBO / f"{name}.tar.gz").read_bytes()
            made = add(builder, tmp_path, target_tar(name)[:], blob=blob)
            assert list(made.files) == ["ext4.fs.meta", ".turbo.ociv1", "gzip.meta", "tar.sums"]
            assert made.files["gzip.meta"].read_bytes() == (TURBO / f"{name}.gzip.meta").read_bytes()
        builder.verify()


def several_members(tar: bytes) -> bytes:
    return gzip.compress(tar[:1500]) + gzip.compress(tar[1500:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tar: compress(tar, "zstd"), "convert the image as a whole.*got zstd"),
        (several_members, "convert the image as a whole.*--several-members"),
        (lambda tar: gzip.compress(tar)[:-30], "gzip"),
        (lambda tar: gzip.compress(tar)[:-8] + bytes(8), "data check|CRC|length"),
    ],
    ids=["zstd", "several members", "cut", "wrong trailer"],
)
def test_layers_that_cannot_be_targets(tmp_path: Path, make: Callable[[bytes], bytes], message: str) -> None:
    tar = tar_bytes([member("a", bytes(range(256)) * 40)])
    with TurboBuilder(tmp_path, OPTIONS, ("ext4",)) as builder, pytest.raises(FormatError, match=message):
        add(builder, tmp_path, tar, blob=make(tar))


def test_a_layer_of_several_gzip_members_when_asked(tmp_path: Path) -> None:
    tar = tar_bytes([member("a", bytes(range(256)) * 40)])
    with TurboBuilder(tmp_path, OPTIONS, ("ext4",), several_members=True) as builder:
        made = add(builder, tmp_path, tar, blob=several_members(tar))
        assert made.files["gzip.meta"].read_bytes()[8] == 2, "the original must refuse it"
        builder.verify()
