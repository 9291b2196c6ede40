"""The torture image: converted, it is what containerd's overlayfs shows, by the kernel and without it."""

from __future__ import annotations

import io
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.apply import apply_layer
from obdlab.convert.compare.listing import differences, list_tree, list_volume
from obdlab.convert.image import ConvertOptions
from obdlab.convert.tree.target import Ext4Tree
from obdlab.image.view import Disk
from obdlab.layers.lsmt import open_layer
from obdlab.localfile import LocalFile
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume
from tests.convert.converting import convert, lowers_of, mounted, stacks
from tests.convert.layouts import Layout
from tests.convert.oracle import stable
from tests.convert.torture import gnu_only_layer, large_file_layout, torture_tars
from tests.volumes.ext4.disk import FileDisk, fsck

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.convert.compare.listing import TreeEntry
    from obdlab.convert.image import ConvertedImage
    from obdlab.server.client import DeviceService
    from tests.convert.oracle import Containerd

pytestmark = [pytest.mark.kernel, pytest.mark.containerd]


def without_mount(image: ConvertedImage, layout: Path) -> dict[str, TreeEntry]:
    with ExitStack() as ended:
        files = [LocalFile(lower.file) for lower in lowers_of(image, layout)]
        layers = [ended.enter_context(open_layer(file)) for file in files]
        return list_volume(Volume(Disk(layers)))


@pytest.mark.parametrize("small", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_torture_image(
    small: int, devices: DeviceService, work_dir: Path, containerd: Containerd, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "source")
    layout.write_index([layout.add_image(torture_tars(small), how=["gzip", "plain", "zstd", "gzip"])])
    wanted = containerd.listing(tmp_path / "source", f"torture{small}")
    assert len(wanted) > small // 2
    image = convert(str(tmp_path / "source"), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=work_dir))
    config = stacks(lowers_of(image, tmp_path / "out"))[-1]
    with mounted(config, devices, tmp_path / "mounted") as root:  # e2fsck looks at it as well
        got = list_tree(root)
    assert differences(got, wanted, ignore_at=stable(wanted)) == []
    assert differences(without_mount(image, tmp_path / "out"), got) == []


def test_gnu_formats_are_what_gnu_tar_extracts(tmp_path: Path) -> None:
    tar = gnu_only_layer()
    (tmp_path / "extracted").mkdir()
    subprocess.run(["tar", "-xpf", "-", "--numeric-owner", "-C", str(tmp_path / "extracted")], input=tar, check=True)
    with FileDisk(tmp_path / "disk", 64 << 20) as disk:
        make_filesystem(disk)
        tree = Ext4Tree(disk)
        apply_layer(io.BytesIO(tar), "layer", tree)
        tree.finish()
        got = list_volume(Volume(disk))
    assert fsck(tmp_path / "disk") == ""
    wanted = list_tree(tmp_path / "extracted")
    assert differences(got, wanted, ignore_at={**stable(wanted), ".": ["mtime_ns", "mode"]}) == []


@pytest.mark.slow
def test_a_file_above_4_gib(devices: DeviceService, work_dir: Path, tmp_path: Path) -> None:
    size = (4 << 30) + 12_345
    sha256 = large_file_layout(tmp_path / "source", size)
    image = convert(str(tmp_path / "source"), f"oci:{tmp_path / 'out'}", ConvertOptions(work_dir=work_dir))
    with mounted(stacks(lowers_of(image, tmp_path / "out"))[-1], devices, tmp_path / "mounted") as root:
        entry = list_tree(root)["large"]
    assert (entry.size, entry.sha256) == (size, sha256)
