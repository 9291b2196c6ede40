"""Applied layers list exactly as containerd's overlayfs shows them; containerd itself is the oracle."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.apply import ApplyError, apply_layer
from obdlab.convert.compare.listing import TreeEntry, differences, list_volume
from obdlab.convert.tree.target import Ext4Tree
from obdlab.errors import FormatError
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume
from tests.convert.images import RandomImage, whole_image
from tests.convert.layouts import make_layout, tar_bytes
from tests.convert.oracle import RefusedError, stable
from tests.volumes.ext4.disk import FileDisk

if TYPE_CHECKING:
    from pathlib import Path

    from tests.convert.layouts import Member
    from tests.convert.oracle import Containerd

pytestmark = pytest.mark.containerd


def applied(image: Path, layers: list[list[Member]]) -> dict[str, TreeEntry] | None:
    """What our applier makes of the layers, None if it refuses them."""
    with FileDisk(image, 1 << 30) as disk:
        make_filesystem(disk)
        for number, members in enumerate(layers):
            tree = Ext4Tree(disk)
            try:
                apply_layer(io.BytesIO(tar_bytes(members)), f"layer {number}", tree)
            except (FormatError, ApplyError):
                return None
            tree.finish()
        return list_volume(Volume(disk))


def test_everything_at_once(containerd: Containerd, tmp_path: Path) -> None:
    layers = whole_image()
    make_layout(tmp_path / "layout", layers, how=["gzip", "zstd", "plain", "gzip"])
    wanted = containerd.listing(tmp_path / "layout", "everything")
    got = applied(tmp_path / "root", layers)
    assert got is not None
    assert len(wanted) > 60
    assert differences(got, wanted, ignore_at=stable(wanted)) == []


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 300), marks=pytest.mark.slow)])
def test_random_images(containerd: Containerd, tmp_path: Path, seeds: range) -> None:
    compared = 0
    for seed in seeds:
        layers = RandomImage(seed).layers()
        make_layout(tmp_path / f"layout{seed}", layers)
        try:
            wanted = containerd.listing(tmp_path / f"layout{seed}", f"random{seed}")
        except RefusedError:
            # What containerd does not unpack (a path through a file, say) has no view to compare with.
            applied(tmp_path / f"root{seed}", layers)
            continue
        got = applied(tmp_path / f"root{seed}", layers)
        assert got is not None, f"seed {seed}"
        assert differences(got, wanted, ignore_at=stable(wanted)) == [], f"seed {seed}"
        compared += 1
    assert compared > len(seeds) // 2
