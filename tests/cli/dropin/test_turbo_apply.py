"""turboOCI-apply between overlaybd-create and overlaybd-commit: layers that point into ordinary ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.convert.compare.listing import differences, list_volume
from obdlab.image.open import open_image
from obdlab.settings.settings import Settings
from obdlab.volumes.erofs.volume import Volume as ErofsVolume
from obdlab.volumes.ext4.volume import Volume as Ext4Volume
from tests.cli.dropin.running import Tools
from tests.convert.images import whole_image
from tests.convert.layouts import compress, digest_of, tar_bytes
from tests.convert.turbo.test_builder import listing_of
from tests.layers.golden import TURBO

TARS = [tar_bytes(members) for members in whole_image()]


def made(
    tools: Tools, tars: list[bytes], how: str, filesystem: str, name: str = "--turboOCI"
) -> list[dict[str, str]]:
    """Make the layers of an image as the original's convertor does; return their entries in a configuration."""
    lowers: list[dict[str, str]] = []
    for number, tar in enumerate(tars):
        mkfs = ["--mkfs"] if number == 0 and filesystem == "ext4" else []
        tools.ok("overlaybd-create", f"{number}.data", f"{number}.index", "1", "-s", name, *mkfs)
        layer = tools.cwd / f"{number}.tar"
        layer.write_bytes(compress(tar, how))
        config = tools.config(f"{number}.json", *lowers, upper=str(number))
        words = [
            "--gz_index_path",
            f"{number}.gzip.meta",
            *(["--fstype", filesystem] if filesystem != "ext4" else []),
        ]
        assert tools.ok("turboOCI-apply", layer, config, *words) == "turboOCI-apply done\n"
        meta = tools.cwd / f"{number}.meta"
        tools.ok("overlaybd-commit", "-z", name, f"{number}.data", f"{number}.index", meta)
        entry = {"file": str(meta), "targetFile": str(layer), "targetDigest": digest_of(layer.read_bytes())}
        index = tools.cwd / f"{number}.gzip.meta"
        assert index.exists() is (how == "gzip")
        lowers.append(entry | ({"gzipIndex": str(index)} if how == "gzip" else {}))
    return lowers


@pytest.mark.parametrize("how", ["plain", "gzip"])
@pytest.mark.parametrize("filesystem", ["ext4", "erofs"])
def test_the_layers_show_the_files_of_their_tars(tools: Tools, filesystem: str, how: str) -> None:
    lowers = made(tools, TARS, how, filesystem, "--turboOCI" if how == "gzip" else "--fastoci")
    sizes = [Path(lower["file"]).stat().st_size for lower in lowers]
    assert max(sizes) < 200_000
    volume = {"ext4": Ext4Volume, "erofs": ErofsVolume}[filesystem]
    with open_image(tools.config("image.json", *lowers), Settings(), traces=False) as disk:
        assert differences(list_volume(volume(disk)), listing_of(TARS)) == []


def test_the_index_of_a_gzip_layer_has_the_originals_bytes(tools: Tools) -> None:
    tools.ok("overlaybd-create", "0.data", "0.index", "1", "-s", "--turboOCI", "--mkfs", "--verbose")
    service = tools.service()
    words = ["--verbose", "--service_config_path", service, "--gz_index_path", "gzip.meta"]
    tools.ok("turboOCI-apply", *words, TURBO / "good.tar.gz", tools.config(upper="0"))
    assert (tools.cwd / "gzip.meta").read_bytes() == (TURBO / "good.gzip.meta").read_bytes()


def test_mkfs_may_come_with_apply_and_the_index_has_a_name_of_its_own(tools: Tools) -> None:
    tools.ok("overlaybd-create", "0.data", "0.index", "1", "--turboOCI")
    tools.ok("turboOCI-apply", "--mkfs", TURBO / "good.tar.gz", tools.config(upper="0"))
    assert (tools.cwd / "gzip.meta").read_bytes() == (TURBO / "good.gzip.meta").read_bytes()
    tools.ok("overlaybd-commit", "-z", "--turboOCI", "-f", "0.data", "0.index", "meta")


def test_apply_makes_a_turbo_layer_where_it_is_asked_for_an_index(tools: Tools) -> None:
    tools.ok("overlaybd-create", "0.data", "0.index", "1", "-s", "--turboOCI", "--mkfs")
    (tools.cwd / "layer").write_bytes(compress(TARS[0], "gzip"))
    tools.ok("overlaybd-apply", "--gz_index_path", "index", "layer", tools.config(upper="0"))
    tools.ok("overlaybd-commit", "-z", "--fastoci", "0.data", "0.index", "meta")
    paths = {"file": "meta", "targetFile": "layer", "gzipIndex": "index"}
    lower = {key: str(tools.cwd / name) for key, name in paths.items()}
    with open_image(tools.config("image.json", lower), Settings(), traces=False) as disk:
        assert differences(list_volume(Ext4Volume(disk)), listing_of(TARS[:1])) == []


@pytest.mark.parametrize(
    ("damage", "text"),
    [("cut layer", "layer"), ("cut index", "index file ends inside a record"), ("no upper", "no writable layer")],
)
def test_a_damaged_layer_or_index_file_is_refused(tools: Tools, damage: str, text: str) -> None:
    tools.ok("overlaybd-create", "0.data", "0.index", "1", "-s", "--turboOCI", "--mkfs")
    config, layer = tools.config(upper="" if damage == "no upper" else "0"), tools.cwd / "layer"
    layer.write_bytes(compress(TARS[0], "gzip"))
    if damage == "cut layer":
        layer.write_bytes(layer.read_bytes()[:-100])
    if damage == "cut index":
        tools.ok("turboOCI-apply", "layer", config)
        index = tools.cwd / "0.index"
        index.write_bytes(index.read_bytes()[:-5])
    done = tools.run("turboOCI-apply", "layer", config, "--gz_index_path", "other")
    assert done.returncode == 255
    assert text in done.stderr
    assert not (tools.cwd / "other").exists()


def test_messages_and_file_systems_that_turbo_layers_do_not_have_are_refused(tools: Tools) -> None:
    tools.ok("overlaybd-create", "0.data", "0.index", "1", "-s", "--turboOCI", "--mkfs")
    assert tools.run("overlaybd-commit", "--turboOCI", "-m", "x", "0.data", "0.index", "m").returncode == 255
    done = tools.run("turboOCI-apply", "--fstype", "xfs", "0.data", tools.config(upper="0"))
    assert (done.returncode, "--fstype" in done.stderr) == (255, True)
