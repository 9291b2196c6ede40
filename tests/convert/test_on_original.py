"""Layers converted here on a base that the original converted."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

import obdlab
from obdlab.convert.compare.listing import differences, list_tree, list_volume
from obdlab.convert.layer import LayerBuilder, LayerOptions
from obdlab.layers.lsmt import open_layer
from obdlab.localfile import LocalFile
from obdlab.volumes.ext4.volume import Volume
from tests.convert.goldens import GOLDEN, golden_view, wanted_view
from tests.convert.layouts import directory, member, tar_bytes
from tests.volumes.ext4.disk import fsck

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
NO_UUID = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(params=[1, 64], ids=["as large", "larger"])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The original's lowest layer, the one that it has above it, and one more, both converted here."""
    more = tar_bytes(
        [
            member("many/added", b"1" * 100_000),
            directory("new/"),
            member("lost+found/x", b""),
            member("etc/.wh..wh..opq"),
        ]
    )
    names = [str(GOLDEN / "layer1.obd")]
    with LayerBuilder(tmp_path, LayerOptions(virtual_size=request.param * GIB), large=False) as builder:
        builder.add_lower(open_layer(LocalFile(names[0])))
        for tar in ((GOLDEN / "layer2.tar").read_bytes(), more):
            layer = builder.build([("layer", [tar])], uuid=NO_UUID, parent_uuid=None).result()
            names.append(str(layer.path))
        return names


def test_the_stack_holds_what_the_originals_own_does(built: list[str]) -> None:
    with obdlab.open_stack(built[:2]) as disk:
        assert golden_view(list_volume(Volume(disk))) == wanted_view(2)


@pytest.mark.kernel
def test_the_kernel_mounts_it(built: list[str], tmp_path: Path) -> None:
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with obdlab.open_stack(built) as disk:
        got = list_volume(Volume(disk))
        with image.open("wb") as file:
            os.truncate(file.fileno(), disk.size)
            for owned in disk.owners():
                if owned.layer is not None and not owned.zeroed:
                    file.seek(owned.begin)
                    file.write(disk.read_at(owned.begin, owned.end - owned.begin))
    assert fsck(image) == ""
    subprocess.run(["mount", "-o", "loop,ro", str(image), str(mounted)], check=True, timeout=60)
    try:
        assert differences(list_tree(mounted), got) == []
        assert (mounted / "many/added").read_bytes() == b"1" * 100_000
        assert os.listdir(mounted / "etc") == []
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=60)
