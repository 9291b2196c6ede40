"""Building warp layers: what is mapped, written over, discarded, and how it reads once committed."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.errors import SourceError
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.stack import Stack
from obdlab.layers.targetdisk import TargetDisk
from obdlab.layers.upper import SparseUpper
from obdlab.layers.warp import WarpLayer
from tests.layers.lsmt_samples import layer

SIZE = 64 << 10
TARGET = MemoryBlob(bytes(range(1, 256)) * 514, "tar")  # no sector of it equals another or has a zero


def committed(disk: TargetDisk) -> WarpLayer:
    out = io.BytesIO()
    disk.commit(out)
    return WarpLayer(TARGET, MemoryBlob(out.getvalue(), "meta"))


def new_disk(path: Path, lowers: Stack | None = None) -> TargetDisk:
    return TargetDisk(lowers, SparseUpper.create(path, SIZE))


def test_mapped_ranges_read_from_the_target(tmp_path: Path) -> None:
    with new_disk(tmp_path / "u") as disk:
        disk.write_at(0, b"m" * 4096)
        disk.map_at(8192, 5120, 1024)
        disk.map_at(16384, 512, 0)
        disk.write_at(16384, b"x" * 512)
        with pytest.raises(SourceError, match="mapped to the target at offset 8192"):
            disk.read_at(8192, 1)
        assert disk.read_at(16384, 512) == b"x" * 512
        made = committed(disk)
    assert made.uuid == "00000000-0000-0000-0000-000000000000"
    data = Stack([made]).read_at(0, SIZE)
    assert data[:4096] == b"m" * 4096
    assert data[8192:13312] == TARGET[1024 : 1024 + 5120]
    assert not any(data[13312:16384])
    assert data[16384:16896] == b"x" * 512
    assert not any(data[16896:])


@pytest.mark.parametrize("change", [(8191, 512, 512), (8192, 511, 512), (8192, 512, 100)])
def test_only_whole_sectors_are_mapped(tmp_path: Path, change: tuple[int, int, int]) -> None:
    with new_disk(tmp_path / "u") as disk, pytest.raises(ValueError, match="not whole sectors"):
        disk.map_at(*change)


@pytest.mark.parametrize("below", ["a lower layer", "an earlier write", "an earlier file"])
def test_the_rest_of_a_block_is_zeros_over_what_was_there(tmp_path: Path, below: str) -> None:
    lower = layer([(0, 64, False)], SIZE)
    lowers = Stack([lower]) if below == "a lower layer" else None
    with new_disk(tmp_path / "u", lowers) as disk:
        if below == "an earlier write":
            disk.write_at(4096, b"o" * 4096)
        if below == "an earlier file":
            disk.map_at(4096, 4096, 8192)
        disk.map_at(4096, 512, 0)
        made = committed(disk)
    whole = [lower, made] if lowers is not None else [made]
    assert Stack(whole).read_at(4096, 4096) == TARGET[:512] + bytes(3584)


step = st.tuples(
    st.sampled_from(["map", "write", "discard"]), st.integers(0, 15), st.integers(1, 4), st.integers(0, 200)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(step, max_size=12), st.booleans())
def test_any_order_of_changes(steps: list[tuple[str, int, int, int]], over: bool) -> None:
    # Blocks of 4 KiB, as file systems change them; files of any number of sectors.
    lower = layer([(8, 40, False)], SIZE, 3)
    wanted = bytearray(Stack([lower]).read_at(0, SIZE) if over else SIZE)
    with tempfile.TemporaryDirectory() as name:
        with new_disk(Path(name) / "u", Stack([lower]) if over else None) as disk:
            for kind, block, count, place in steps:
                at, length = block * 4096, min(count, 16 - block) * 4096
                if kind == "map":
                    mapped = length - 512 * (place % 8)
                    disk.map_at(at, mapped, place * 512)
                    wanted[at : at + length] = TARGET[place * 512 : place * 512 + mapped].ljust(length, b"\0")
                elif kind == "write":
                    disk.write_at(at, bytes([place]) * length)
                    wanted[at : at + length] = bytes([place]) * length
                else:
                    disk.discard(at, length)
                    wanted[at : at + length] = bytes(length)
            made = committed(disk)
        layers: list[LsmtLayer] = [lower, made] if over else [made]
        assert Stack(layers).read_at(0, SIZE) == wanted


def test_records_of_files_that_follow_in_the_tar_are_joined(tmp_path: Path) -> None:
    with new_disk(tmp_path / "u") as disk:
        for number in range(4):
            disk.map_at(4096 * number, 4096, 512 + 4096 * number)
        made = committed(disk)
    assert len(made.index) == 1
