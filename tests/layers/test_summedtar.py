"""Pieces of a tar against their sums: right bytes, an error, or the right bytes after forgetting wrong ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob, Wrapper
from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.tarsums import HEADER_SIZE, SumsHeader, TarSums
from obdlab.layers.spancache import SpanCache
from obdlab.layers.summedtar import SummedTar

PIECE = 4096
CONTENT = bytes(range(251)) * 60


def sums_of(content: bytes, *cuts: int) -> bytes:
    sums = TarSums(PIECE)
    edges = [0, *sorted(cuts), len(content)]
    parts = [content[begin:end] for begin, end in itertools.pairwise(edges)]
    assert b"".join(sums.passing(parts)) == content
    return sums.to_bytes()


@given(st.integers(0, 15_000), st.lists(st.integers(0, 15_000), max_size=5), st.data())
def test_the_parts_that_pass_do_not_matter(size: int, cuts: list[int], data: st.DataObject) -> None:
    content = CONTENT[:size]
    sums = sums_of(content, *(min(cut, size) for cut in cuts))
    assert sums == sums_of(content)
    assert SumsHeader.from_bytes(sums, file_size=len(sums)) == SumsHeader(PIECE, size)
    tar = SummedTar(MemoryBlob(content), MemoryBlob(sums), SpanCache())
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    assert tar.read_at(begin, end - begin) == content[begin:end]


class Source(Wrapper):
    """Wrong until it is told to forget; counts."""

    def __init__(self, content: bytes, *, wrong: bool, heals: bool = True) -> None:
        super().__init__(MemoryBlob(content, "target"))
        self.wrong, self.heals = wrong, heals
        self.reads = 0
        self.evicted: list[tuple[int, int]] = []

    def read_at(self, offset: int, length: int, call=None) -> bytes:
        self.reads += 1
        data = super().read_at(offset, length, call)
        return data[:-1] + bytes([data[-1] ^ 1]) if self.wrong else data

    def evict(self, offset: int, length: int) -> None:
        self.evicted.append((offset, length))
        self.wrong = self.wrong and not self.heals


def test_wrong_bytes_are_forgotten_below_and_read_once_more() -> None:
    source = Source(CONTENT, wrong=True)
    tar = SummedTar(source, MemoryBlob(sums_of(CONTENT)), SpanCache())
    assert tar.read_at(5000, 10) == CONTENT[5000:5010]
    assert (source.reads, source.evicted) == (2, [(PIECE, PIECE)])
    assert tar.read_at(4096, 4096) == CONTENT[4096:8192]
    assert source.reads == 2  # the checked piece is kept
    tar.evict(4096, 1)
    tar.read_at(4096, 1)
    assert source.reads == 3


def test_what_stays_wrong_is_an_error() -> None:
    source = Source(CONTENT, wrong=True, heals=False)
    tar = SummedTar(source, MemoryBlob(sums_of(CONTENT)), SpanCache())
    for _ in range(2):
        with pytest.raises(CorruptBlobError, match=r"target: content .* sums at offset 12288"):
            tar.read_at(12_300, 5)
    assert source.reads == 4


def test_every_bit_of_the_sums_counts() -> None:
    content = CONTENT[:5000]
    sums = sums_of(content)
    for bit in range(len(sums) * 8):
        if HEADER_SIZE - 8 <= bit // 8 < HEADER_SIZE:
            continue  # nothing is there yet
        damaged = bytearray(sums)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FormatError, CorruptBlobError)):
            SummedTar(MemoryBlob(content), MemoryBlob(bytes(damaged)), SpanCache()).read_at(0, len(content))


def test_every_bit_of_the_content_counts() -> None:
    content = CONTENT[:200]
    sums = MemoryBlob(sums_of(content))
    for bit in range(len(content) * 8):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptBlobError):
            SummedTar(MemoryBlob(bytes(damaged)), sums, SpanCache()).read_at(bit // 8, 1)


def test_sums_of_another_tar() -> None:
    with pytest.raises(FormatError, match=r"of another tar .*got 5000, wanted 5001"):
        SummedTar(MemoryBlob(CONTENT[:5001]), MemoryBlob(sums_of(CONTENT[:5000])), SpanCache())
    for size in (0, HEADER_SIZE - 1, HEADER_SIZE):
        with pytest.raises(FormatError):
            SummedTar(MemoryBlob(CONTENT), MemoryBlob(sums_of(CONTENT)[:size]), SpanCache())


def test_ranges_below_are_whole_pieces() -> None:
    tar = SummedTar(MemoryBlob(CONTENT), MemoryBlob(sums_of(CONTENT)), SpanCache())
    assert tar.map_range(1, 2) == (0, PIECE)
    assert tar.map_range(PIECE, 3 * PIECE + 1) == (PIECE, 15_060)
    assert tar.map_range(7, 7) == (7, 7)
    assert tar.piece(15_000) == (12_288, 15_060)
