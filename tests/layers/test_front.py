"""The front of a layer: where its bytes are, and what a layer that tells lies gets."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob, Wrapper
from obdlab.errors import OutOfRangeError
from obdlab.formats.lsmt.layout import HEADER_SPACE, SECTOR
from obdlab.image.open import open_stack
from obdlab.layerfiles.writing import Packing, write_packed
from obdlab.layers.append import AppendUpper
from obdlab.layers.commit import commit
from obdlab.layers.front import MOST_FRONT, commit_with_front, front_of, has_front
from obdlab.layers.lsmt import open_layer
from obdlab.layers.stack import Stack
from obdlab.volumes.blockranges import sectors_of_blocks

if TYPE_CHECKING:
    from pathlib import Path

    from obdlab.call import Call
    from obdlab.layers.lsmt import LsmtLayer
    from obdlab.layers.ordering import SectorRange

SIZE = 8 << 20
BLOCK = 4096 // SECTOR
# Blocks of the disk, some before, among and behind the rest, and one that the layer does not hold.
METADATA = [(0, BLOCK), (100 * BLOCK, 104 * BLOCK), (1000 * BLOCK, 1001 * BLOCK), (2000 * BLOCK, 2001 * BLOCK)]


class Fence(Wrapper):
    """A blob that refuses reads from ``stop`` on."""

    stop = SIZE

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if offset + length > self.stop:
            raise OutOfRangeError(f"{offset + length} is behind {self.stop}")
        return super().read_at(offset, length, call)


def written(directory: Path, packing: Packing, metadata: list[SectorRange], tag: str = "") -> tuple[LsmtLayer, bytes]:
    """A layer of random bytes, opened, and its file; with ``tag`` an ordinary one of this commit message."""
    rng = random.Random(1)
    path = directory / "layer.obd"
    with AppendUpper.create(directory / "data", directory / "index", SIZE) as upper, path.open("xb") as file:
        for block in (*range(300), 1000):
            upper.write_at(block * 4096, rng.randbytes(2048) * 2)
        if tag:
            write_packed(file, packing, lambda sink: commit(upper, sink, user_tag=tag), name="layer")
        else:
            write_packed(file, packing, lambda sink: commit_with_front(upper, sink, metadata, uuid=""), name="layer")
    data = path.read_bytes()
    return open_layer(MemoryBlob(data, "layer")), data


@pytest.mark.parametrize("packing", [Packing("zstd", 16384, tar=True), Packing("lz4"), Packing("")])
def test_all_metadata_can_be_read_from_the_front_alone(tmp_path: Path, packing: Packing) -> None:
    _, data = written(tmp_path, packing, METADATA)
    fence = Fence(MemoryBlob(data, "layer"))
    layer = open_layer(fence)
    front = front_of(layer, fence)
    assert has_front(layer)
    # Six blocks of 4 KiB that compress by half, rounded to compressed blocks; the file has 301.
    assert 6 * 2048 < front < 6 * 4096 + 2 * 16384 + 1024 < len(data) / 8
    with open_stack([tmp_path / "layer.obd"]) as wanted:
        fence.stop = front
        disk = Stack([layer])
        for begin, end in METADATA:
            at, length = begin * SECTOR, (end - begin) * SECTOR
            assert disk.read_at(at, length) == wanted.read_at(at, length)
        with pytest.raises(OutOfRangeError):
            disk.read_at(299 * 4096, 4096)
        fence.stop = len(data)
        assert disk.read_at(0, SIZE) == wanted.read_at(0, SIZE)


def test_a_layer_without_metadata_is_an_ordinary_one(tmp_path: Path) -> None:
    layer, _ = written(tmp_path, Packing("zstd"), [(2000 * BLOCK, 2001 * BLOCK)])
    assert not has_front(layer)
    assert layer.user_tag.rstrip("\0") == ""
    assert front_of(layer, layer.data) == 0


@pytest.mark.parametrize(
    "tag",
    [
        "obdlab: 0 sectors of metadata first",
        "obdlab: 09 sectors of metadata first",
        "obdlab: -8 sectors of metadata first",
        "obdlab: ٣ sectors of metadata first",
        "obdlab: 8 sectors of metadata first!",
        "obdlab: 999999999999 sectors of metadata first",
        f"obdlab: {301 * BLOCK + 1} sectors of metadata first",
        "obdlab: hot layer",
    ],
)
def test_a_front_that_cannot_be_is_none(tmp_path: Path, tag: str) -> None:
    layer, _ = written(tmp_path, Packing("zstd"), [], tag)
    assert front_of(layer, layer.data) == 0


def test_a_front_larger_than_any_is_not_fetched(tmp_path: Path) -> None:
    layer, _ = written(tmp_path, Packing(""), METADATA)
    sectors = MOST_FRONT // SECTOR
    far = replace(
        layer.trailer,
        index_offset=HEADER_SPACE + sectors * SECTOR,
        user_tag=f"obdlab: {sectors} sectors of metadata first".encode(),
    )
    layer.trailer = far
    assert front_of(layer, layer.data) == 0
    layer.trailer = replace(far, user_tag=f"obdlab: {sectors - 8} sectors of metadata first".encode())
    assert front_of(layer, layer.data) == MOST_FRONT - 8 * SECTOR + HEADER_SPACE


@given(st.lists(st.integers(0, 200), max_size=50))
def test_blocks_become_ranges(blocks: list[int]) -> None:
    ranges = sectors_of_blocks(blocks, 4096)
    assert [block for begin, end in ranges for block in range(begin // BLOCK, end // BLOCK)] == sorted(set(blocks))
    assert all(end < begin for (_, end), (begin, _) in pairwise(ranges))
