"""Differences of two disks, against a comparison of all their bytes."""

from __future__ import annotations

import io
import os
import random
import tempfile

from hypothesis import given
from hypothesis import strategies as st

import obdlab
from obdlab.blob import MemoryBlob
from obdlab.layerfiles.compare import compare
from obdlab.layers.commit import commit
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.layers.stack import Stack
from obdlab.layers.upper import SparseUpper
from tests.layers.golden import LSMT

_writes = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30), st.integers(0, 3)), max_size=6)


def layer(tmp: str, writes: list[tuple[int, int, int]], sectors: int, name: str) -> LsmtLayer:
    with (
        tempfile.TemporaryDirectory(dir=tmp) as directory,
        SparseUpper.create(os.path.join(directory, "data"), sectors * 512) as upper,
    ):
        for at, count, fill in writes:
            count = min(count, sectors - at)
            if count > 0:
                upper.write_at(at * 512, bytes([fill]) * (count * 512))
        out = io.BytesIO()
        commit(upper, out)
    return open_layer(MemoryBlob(out.getvalue(), name))


@given(old=_writes, new=_writes, sectors=st.tuples(st.integers(1, 130), st.integers(1, 130)), shared=st.booleans())
def test_ranges_are_those_of_the_bytes(
    tmp_path_factory: object,
    old: list[tuple[int, int, int]],
    new: list[tuple[int, int, int]],
    sectors: tuple[int, int],
    shared: bool,
) -> None:
    tmp = str(tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    bottom = [layer(tmp, old, sectors[0], "bottom")] if shared else []
    disks = [
        Stack([*bottom, layer(tmp, writes, size, f"top {number}")])
        for number, (writes, size) in enumerate(zip((old, new), sectors, strict=True))
    ]
    end = max(sectors) * 512
    contents = [disk[:].ljust(end, b"\0") for disk in disks]
    heard: list[int] = []
    found = compare(disks[0], disks[1], heard.append)
    wanted = [n for n in range(end // 512) if contents[0][n * 512 :][:512] != contents[1][n * 512 :][:512]]
    assert [n for a, b in found.ranges for n in range(a // 512, b // 512)] == wanted
    assert all(a[1] < b[0] for a, b in zip(found.ranges, found.ranges[1:], strict=False)), "joined"
    assert found.size == 512 * len(wanted)
    assert found.same == (not wanted and sectors[0] == sectors[1])
    assert sum(heard) == end


def test_what_both_have_from_one_file_is_not_read() -> None:
    bottom = str(LSMT / "l1.plain.lsmt")
    top = str(LSMT / "l2.plain.lsmt")
    with obdlab.open_stack([bottom, top]) as old, obdlab.open_stack([bottom, top]) as new:
        assert compare(old, new).compared == 0
    source = random.Random(3)
    data = bytearray((LSMT / "l1.plain.lsmt").read_bytes())
    data[8192 + source.randrange(512)] ^= 1
    with obdlab.open_stack([bottom]) as old, Stack([open_layer(MemoryBlob(data, "changed"))]) as new:
        assert compare(old, new).size == 512
