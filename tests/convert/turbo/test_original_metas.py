"""Metadata beside that of the original's tools, of the same layers: what both show, and where both find it."""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from obdlab.convert.compare.listing import differences, list_volume
from obdlab.convert.turbo.builder import TurboBuilder
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.layers.lsmt import open_layer
from obdlab.layers.stack import Stack
from obdlab.layers.warp import WarpFile, WarpLayer
from obdlab.localfile import LocalFile
from obdlab.volumes.ext4.volume import Volume
from tests.convert.turbo.test_builder import OPTIONS, VOLUMES, add, listing_of
from tests.layers.golden import TURBO, target_tar, turbo_stack, warp_file

CHAIN = ("l1", "l2", "l3")
#: Where the original's tree is not that of the layers by containerd's rules; as its own manifest has it, but for
#: trusted attributes, which containerd's unpacking does not set.
DEVIATES = ["lost+found: ", "data/f0: uid ", "data/f1024: uid ", "data/f511: uid ", "links/dots: target ",
            "links/slash: target ", "attrs/dir: xattrs "]  # fmt: skip


@contextmanager
def made(directory: Path, names: tuple[str, ...]) -> Iterator[dict[str, list[WarpLayer]]]:
    """The layers of the golden chain as made here, for both file systems at once."""
    with TurboBuilder(directory, OPTIONS, tuple(VOLUMES)) as builder:
        found: dict[str, list[WarpLayer]] = {name: [] for name in VOLUMES}
        for name in names:
            files = add(builder, directory, target_tar(name)[:], blob=(TURBO / f"{name}.tar.gz").read_bytes()).files
            for each, layers in found.items():
                layer = open_layer(LocalFile(files[f"{each}.fs.meta"]), kind=partial(WarpLayer, target_tar(name)))
                assert isinstance(layer, WarpLayer)
                layers.append(layer)
        yield found
        for layers in found.values():
            for layer in layers:
                layer.file.close()


@pytest.mark.parametrize("names", [CHAIN, ("good",)], ids="+".join)
def test_trees_are_the_originals_but_for_its_faults(tmp_path: Path, names: tuple[str, ...]) -> None:
    original = Stack([open_layer(warp_file(name), kind=partial(WarpLayer, target_tar(name))) for name in names])
    assert original.size == turbo_stack(*names)["vsize"]
    theirs = list_volume(Volume(original))
    with made(tmp_path, names) as layers:
        for filesystem, volume in VOLUMES.items():
            stack = Stack(layers[filesystem])
            assert stack.size == original.size
            found = list_volume(volume(stack))
            assert differences(found, listing_of([target_tar(name)[:] for name in names])) == []
            for difference in differences(found, theirs):
                assert any(difference.startswith(known) for known in DEVIATES), difference


def test_contents_lie_in_the_tar_at_their_places(tmp_path: Path) -> None:
    """No byte of a usual file is stored again, and both file systems in a blob point to the same ones."""
    wanted: dict[bytes, tuple[int, int]] = {}
    with tarfile.open(fileobj=io.BytesIO(target_tar("good")[:])) as tar:
        for info in tar.getmembers():
            if info.isreg() and info.size:
                wanted[b"/" + info.name.strip("./").encode()] = info.offset_data, info.size
    assert len(wanted) > 10
    with made(tmp_path, ("good",)) as layers:
        for filesystem, volume in VOLUMES.items():
            stack, data = Stack(layers[filesystem]), layers[filesystem][0].data
            assert isinstance(data, WarpFile)
            opened = volume(stack)
            found = {}
            for path, _, inode in opened.walk():
                if not stat.S_ISREG(inode.mode) or not inode.size:
                    continue
                for at, length, place in opened.places(inode):
                    end = -(-min(length, inode.size - at) // SECTOR)
                    for begin, count, _, source in stack.index.lookup(place // SECTOR, place // SECTOR + end):
                        in_tar = source * SECTOR - data.target_at
                        in_file = at + begin * SECTOR - place
                        assert in_tar == wanted[path][0] + in_file, path
                        found[path] = max(found.get(path, 0), in_file + count * SECTOR)
            assert found == {path: -(-size // SECTOR) * SECTOR for path, (_, size) in wanted.items()}


def test_metas_take_no_more_than_the_originals(tmp_path: Path) -> None:
    with made(tmp_path, CHAIN) as layers:
        for filesystem, found in layers.items():
            sizes = [Path(layer.name).stat().st_size for layer in found]
            assert sum(sizes) <= sum(warp_file(name).size for name in CHAIN), filesystem
