"""Commands that read images, with turboOCI images in a registry and in a layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from tests.cli.test_mount_command import Bed
from tests.convert.converting import convert
from tests.convert.layouts import directory, make_layout, member
from tests.convert.turbo.test_image import push
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.registry

LAYERS = [
    [directory("d"), member("d/a", b"contents of a\n" * 1000), member("gone", b"x")],
    [member(".wh.gone"), member("d/b", b"b" * 70_000)],
]


@pytest.fixture(params=["registry", "layout"])
def images(request: pytest.FixtureRequest, registry_server: RegistryServer, tmp_path: Path) -> tuple[str, str]:
    """The names of an ordinary image and of a turboOCI image made of it."""
    make_layout(tmp_path / "source", LAYERS)
    options = ConvertOptions(layer=LayerOptions(virtual_size=1 << 30), turbo=("ext4", "erofs"), work_dir=tmp_path)
    if request.param == "layout":
        source, turbo = f"oci:{tmp_path / 'source'}", f"oci:{tmp_path / 'out'}:turbo"
    else:
        source, _ = push(registry_server, tmp_path / "source", "cli/turbo")
        turbo = source.replace(":v1", ":turbo")
    convert(source, turbo, options)
    return source, turbo


def test_its_files_are_read_and_compared(
    images: tuple[str, str], tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    source, turbo = images
    assert main(["image", "verify", source, turbo, "--work-dir", str(tmp_path)]) == 0
    capsysbinary.readouterr()
    assert main(["image", "cat", f"{turbo}:/d/a"]) == 0
    assert capsysbinary.readouterr().out == b"contents of a\n" * 1000
    assert main(["image", "ls", f"{turbo}:/"]) == 0
    assert b"gone" not in capsysbinary.readouterr().out


def test_its_kind_is_shown(images: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "inspect", "--json", images[1]]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["images"]
    assert (shown["kind"], [layer["kind"] for layer in shown["layers"]]) == ("turboOCI", ["turboOCI", "turboOCI"])


@pytest.mark.kernel
def test_it_is_mounted_and_nothing_stays(images: tuple[str, str], tmp_path: Path) -> None:
    root = tmp_path.resolve()
    bed = Bed(root / "run", root / "cache", root / "mnt")
    try:
        bed("device mount", images[1], str(bed.target))
        assert (bed.target / "d" / "a").read_bytes() == b"contents of a\n" * 1000
        assert sorted(os.listdir(bed.target)) == ["d"]
        bed("device umount", str(bed.target))
        bed.until_nothing_is_left()
        assert list((root / "cache-images").rglob("*.meta")) == []
    finally:
        bed("cleanup", "--force", "--cache")
        bed.until_nothing_is_left()
