"""Fetching both ends of a layer: opening it afterwards reads nothing else."""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.call import Call
from obdlab.formats.tar import wrap_header, wrap_tail
from obdlab.formats.zfile.layout import Flags, ZFileHeader
from obdlab.layers import ends
from obdlab.layers.commit import commit
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.layers.zfile import ZFileWriter
from tests.layers.lsmt_samples import sealed_bytes

DISK = 64 << 20


class Held(Blob):
    """A blob of which some bytes have been read; reads of others are requests."""

    def __init__(self, content: bytes) -> None:
        self.name = "held"
        self._content = content
        self.held = bytearray(len(content))
        self.requests: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return len(self._content)

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        if self.held.count(0, offset, offset + length):
            self.requests.append((offset, length))
            self.held[offset : offset + length] = b"\1" * length
        return self._content[offset : offset + length]


def layer_of(segments: int, block_size: int, *, wrapped: bool, random_data: bool, sectors: int = 1) -> bytes:
    """A compressed layer of segments that are two sectors apart, random or zeros."""
    draw = random.Random(segments)
    rows = [(number * (sectors + 2), sectors, 8 + number * sectors, False, 0) for number in range(segments)]
    size = segments * sectors * 512
    data = draw.randbytes(size) if random_data else bytes(size)
    out = io.BytesIO()
    with ZFileWriter(out, block_size=block_size, algorithm="lz4") as writer:
        commit(LsmtLayer(MemoryBlob(sealed_bytes(rows, data, DISK))), writer)
    content = out.getvalue()
    return wrap_header(len(content)) + content + wrap_tail(len(content)) if wrapped else content


class Hostile(Blob):
    """A large blob of zeros behind its first bytes."""

    def __init__(self, head: bytes, size: int) -> None:
        self.name = "hostile"
        self._head = head
        self._size = size
        self.longest = 0

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.longest = max(self.longest, length)
        assert length <= ends._MOST_REST
        return self._head[offset : offset + length].ljust(length, b"\0")


@pytest.mark.parametrize(
    "wrong",
    [
        {"index_offset": 512, "index_size": 0, "original_size": 0},
        {"index_offset": 512},
        {"block_size": 0},
        {"block_size": (1 << 32) - 1},
        {"index_offset": (1 << 64) - 1},
    ],
)
def test_a_header_makes_opening_read_no_more_than_it_may(wrong: dict[str, int]) -> None:
    size = 1 << 30
    index = {"index_offset": size - 512 - 4, "index_size": 1, "original_size": 4096}
    head = ZFileHeader(Flags.HEADER | Flags.OVERWRITTEN, **(index | wrong)).to_bytes()
    ends.fetch_rest_of_end(Hostile(head, size))


def test_the_first_guess_is_bounded() -> None:
    assert ends.guessed_end(1 << 62) <= 16 << 20


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("block_size", [4096, 16384])
@pytest.mark.parametrize(
    ("segments", "random_data"), [(0, True), (1, True), (60, True), (900, True), (20_000, True), (20_000, False)]
)
def test_opening_reads_what_was_fetched(segments: int, block_size: int, random_data: bool, wrapped: bool) -> None:
    content = layer_of(segments, block_size, wrapped=wrapped, random_data=random_data)
    blob = Held(content)
    with ThreadPoolExecutor(1) as threads:
        beginning, end = ends.fetch_ends(blob, 4096, threads)
        assert beginning == min(len(content), 32 << 10)
        assert (end is None) == (len(content) <= 32 << 10)
        if end is not None:
            end.result(30)
    assert len(blob.requests) <= 2
    assert sum(length for _, length in blob.requests) <= (32 << 10) + ends.guessed_end(len(content))
    ends.fetch_rest_of_end(blob)
    assert len(blob.requests) <= 3
    fetched = list(blob.requests)
    layer = open_layer(blob)
    assert blob.requests == fetched
    assert layer.virtual_size == DISK
    assert len(layer.index) == segments
    # The second round asks for no more than the index and the blocks around it.
    for offset, length in fetched[2:]:
        assert offset + length == len(content) - ends.guessed_end(len(content))
        assert length <= segments * 16 + (256 << 10) + 3 * (block_size + 4)


def test_a_guess_that_is_too_short_costs_one_more_request() -> None:
    # A block of zeros takes some 30 bytes and 4 in the index: more than a share of 448 of the blob.
    content = layer_of(14, 4096, wrapped=False, random_data=False, sectors=8192)
    blob = Held(content)
    with ThreadPoolExecutor(1) as threads:
        ends.fetch_ends(blob, 4096, threads)[1].result(30)  # type: ignore[union-attr]
    ends.fetch_rest_of_end(blob)
    assert len(blob.requests) == 3
    open_layer(blob)
    assert len(blob.requests) == 3


@pytest.mark.parametrize("unit", [1, 4096, 5000, 1 << 20])
def test_the_beginning_is_whole_units(unit: int) -> None:
    blob = Held(bytes(3 << 20))
    with ThreadPoolExecutor(1) as threads:
        beginning, end = ends.fetch_ends(blob, unit, threads)
        assert end is not None
        end.result(30)
    assert beginning % unit == 0
    assert 32 << 10 <= beginning < (32 << 10) + unit
    assert sorted(blob.requests) == [
        (0, beginning),
        ((3 << 20) - ends.guessed_end(3 << 20), ends.guessed_end(3 << 20)),
    ]


@pytest.mark.parametrize("content", [b"", b"junk" * 5000, bytes(100_000)])
def test_what_is_no_compressed_layer_is_left_to_opening(content: bytes) -> None:
    blob = Held(content)
    ends.fetch_rest_of_end(blob)
    assert all(length <= 4096 for _, length in blob.requests)
