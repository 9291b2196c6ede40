"""Mounts are taken for a snapshot only if this snapshotter made them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from obdlab.differ.sides import Sides
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.imagemounts import ImageDevices
from obdlab.snapshotter.layout import Layout
from obdlab.snapshotter.mounts import Mount
from obdlab.snapshotter.overlaybd import ImageOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def snapshotter(tmp_path: Path) -> Iterator[Snapshotter]:
    layout = Layout(tmp_path / "root")
    devices = DeviceService(tmp_path / "run", Settings(cache_dir=tmp_path / "cache"))
    made = Snapshotter(layout, ImageDevices(layout, devices), ImageOptions())
    yield made
    made.close()


@pytest.fixture
def sides(snapshotter: Snapshotter, tmp_path: Path) -> Sides:
    return Sides(snapshotter.snapshots, DeviceService(tmp_path / "run", Settings()))


def test_mounts_of_plain_snapshots(snapshotter: Snapshotter, sides: Sides) -> None:
    bottom = snapshotter.prepare("bottom", "", {})
    assert sides.directory(bottom) == 1
    assert sides.device(bottom) is None
    snapshotter.commit("layer", "bottom", {})
    overlay = snapshotter.prepare("top", "layer", {})
    assert sides.directory(overlay) == 2
    view = snapshotter.view("look", "layer", {})
    assert sides.directory(view) is None
    assert sides.device(view) is None


def test_the_parent_of_a_snapshot_without_one_is_an_empty_view(snapshotter: Snapshotter, sides: Sides) -> None:
    snapshotter.prepare("bottom", "", {})
    snapshotter.commit("layer", "bottom", {})
    empty, of_layer = snapshotter.view("empty", "", {}), snapshotter.view("look", "layer", {})
    active = snapshotter.prepare("active", "", {})
    assert sides.is_parent(empty, None)
    assert sides.is_parent([], None)
    assert not sides.is_parent(of_layer, None)
    assert not sides.is_parent(active, None)
    assert not sides.is_parent(empty, 1)
    assert not sides.is_parent([Mount("bind", empty[0].source.replace("/2/", "/9/"), ("ro",))], None)


@pytest.mark.parametrize(
    ("kind", "source", "options"),
    [
        ("bind", "{root}/snapshots/1/fs/../../2/fs", ("rw",)),
        ("bind", "{root}/snapshots/1/fs/", ("rw",)),
        ("bind", "{root}/snapshots/01/fs", ("rw",)),
        ("bind", "{root}/snapshots/1\n/fs", ("rw",)),
        ("bind", "{root}/snapshots/\u0661/fs", ("rw",)),
        ("bind", "{root}/snapshots/1/work", ("rw",)),
        ("bind", "/etc", ("rw",)),
        ("bind", "{root}/snapshots/1/fs", ("ro", "rbind")),
        ("overlay", "overlay", ("upperdir={root}/snapshots/1/fs", "upperdir={root}/snapshots/2/fs")),
        ("overlay", "overlay", ("lowerdir={root}/snapshots/1/fs",)),
        ("overlay", "overlay", ("upperdir={root}/snapshots/1/fs", *("x",) * 100)),
        ("overlay", "overlay", ("upperdir={root}/snapshots/1/fs", "x" * 100_000)),
        ("tmpfs", "{root}/snapshots/1/fs", ("rw",)),
        ("ext4", "/dev/null", ("rw",)),
    ],
)
def test_other_mounts_are_no_snapshots(
    snapshotter: Snapshotter, sides: Sides, kind: str, source: str, options: tuple[str, ...]
) -> None:
    snapshotter.prepare("one", "", {})
    root = snapshotter.snapshots.layout.root
    mount = Mount(kind, source.format(root=root), tuple(option.format(root=root) for option in options))
    assert sides.directory([mount]) is None
    assert sides.device([mount]) is None


def test_several_mounts_are_no_snapshot(snapshotter: Snapshotter, sides: Sides) -> None:
    (mount,) = snapshotter.prepare("one", "", {})
    assert sides.directory([mount]) == 1
    assert sides.directory([mount, mount]) is None
    assert sides.directory([]) is None
