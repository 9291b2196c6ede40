"""The data of a layer in the order of use: what it says is the same."""

from __future__ import annotations

import io
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.formats.lsmt.layout import HEADER_SPACE, SECTOR
from obdlab.layers.commit import commit
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.ordering import first_uses
from obdlab.layers.stack import Stack
from tests.layers.lsmt_samples import sealed_bytes

SIZE_SECTORS = 256
RANGES = st.lists(
    st.tuples(st.integers(0, SIZE_SECTORS - 1), st.integers(0, 64)).map(
        lambda pair: (pair[0], min(SIZE_SECTORS, sum(pair)))
    ),
    max_size=12,
)


@st.composite
def layers(draw: st.DrawFn, fill: int) -> LsmtLayer:
    edges = sorted(draw(st.sets(st.integers(0, SIZE_SECTORS), min_size=2, max_size=12)))
    rows, data = [], bytearray()
    for begin, end in pairwise(edges):
        kind = draw(st.sampled_from(["data", "data", "zeroed", "hole"]))
        if kind == "hole":
            continue
        rows.append((begin, end - begin, (HEADER_SPACE + len(data)) // SECTOR, kind == "zeroed", 0))
        if kind == "data":
            data += b"".join(bytes([fill, n % 256]) * (SECTOR // 2) for n in range(begin, end))
    return LsmtLayer(MemoryBlob(sealed_bytes(rows, bytes(data), SIZE_SECTORS * SECTOR)))


def committed(source: LsmtLayer | Stack, ranges: list[tuple[int, int]], *, only: bool) -> LsmtLayer:
    out = io.BytesIO()
    commit(source, out, first=ranges, only_first=only)
    return LsmtLayer(MemoryBlob(out.getvalue()))


def content(disk: Stack) -> bytes:
    return disk.read_at(0, disk.size)


@given(layers(1), layers(2), RANGES)
def test_a_reordered_commit_reads_the_same(lower: LsmtLayer, upper: LsmtLayer, ranges: list[tuple[int, int]]) -> None:
    size = SIZE_SECTORS * SECTOR
    base = LsmtLayer(MemoryBlob(sealed_bytes([(0, SIZE_SECTORS, 8, False, 0)], b"\7" * size, size)))
    for source in (upper, Stack([lower, upper])):
        again = committed(source, ranges, only=False)
        below = source if isinstance(source, Stack) else Stack([source])
        assert content(Stack([again])) == content(below)
        # What it hides of a layer below stays hidden.
        assert content(Stack([base, again])) == content(Stack([base, *below.layers]))


@given(layers(1), layers(2), RANGES)
def test_a_layer_of_what_was_used_changes_nothing(
    lower: LsmtLayer, upper: LsmtLayer, ranges: list[tuple[int, int]]
) -> None:
    disk = Stack([lower, upper])
    hot = committed(disk, ranges, only=True)
    assert content(Stack([lower, upper, hot])) == content(disk)
    # All data of the ranges comes from it, in the order of use.
    both = Stack([lower, upper, hot])
    at = HEADER_SPACE // SECTOR
    for begin, end in first_uses(ranges):
        for _, count, source, moffset in both.index.lookup(begin, min(end, SIZE_SECTORS)):
            assert source <= 0
            if source == 0:
                assert moffset == at
                at += count
    assert at * SECTOR == hot.trailer.index_offset


def test_first_uses_are_whole_blocks_each_once() -> None:
    assert first_uses([(17, 18), (0, 9), (100, 100), (16, 32), (8, 12)]) == [(16, 24), (0, 16), (24, 32)]
    assert first_uses([]) == []
