"""Damaged ZFiles: an error naming blob and offset, or the right bytes after asking again; never wrong ones."""

from __future__ import annotations

import random
import re
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.errors import CorruptBlobError, FormatError, ObdlabError
from obdlab.formats.zfile.layout import ZFileHeader
from obdlab.layers.zfile import open_zfile
from tests.layers.zfile_samples import compress, golden

SOURCE = golden("text.bin")[:50_001]
CHECKED = {
    "lz4": compress(SOURCE),
    "lz4, header not rewritten": compress(SOURCE, overwrite_header=False),
    "zstd": compress(SOURCE, 16384, "zstd"),
}
checked = pytest.mark.parametrize("data", CHECKED.values(), ids=CHECKED.keys())


class CachingBlob(MemoryBlob):
    """A damaged copy over a sound original: evicting repairs, after ``lives`` evictions."""

    def __init__(self, copy: bytes, original: bytes, lives: int = 1) -> None:
        super().__init__(bytearray(copy), "cached blob")
        self._original = original
        self._lives = lives
        self.evictions: list[tuple[int, int]] = []

    def evict(self, offset: int, length: int) -> None:
        self.evictions.append((offset, length))
        if len(self.evictions) >= self._lives:
            self._data[offset : offset + length] = self._original[offset : offset + length]


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def read_all(data: bytes) -> bytes:
    reader = open_zfile(MemoryBlob(data, "layer"))
    return reader.read_at(0, reader.size)


@checked
@settings(max_examples=300, deadline=None)
@given(draw=st.data())
def test_a_flipped_bit_gives_an_error_or_does_not_matter(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    try:
        assert read_all(flip(data, bit)) == SOURCE
    except FormatError as error:
        assert "layer" in str(error)
    else:
        # What is not looked at: the trailer under a rewritten header, or the header's own digest flag.
        header = open_zfile(MemoryBlob(data)).header
        unused = range(8 * (len(data) - 512), 8 * len(data)) if header.is_header else ()
        assert bit in unused or bit == 8 * 32 + 4


@checked
def test_damage_is_found_when_a_buffer_is_filled(data: bytes) -> None:
    damaged = flip(data, 8 * 700)
    healing = open_zfile(CachingBlob(damaged, data))
    out = bytearray(len(SOURCE))
    healing.read_into(0, memoryview(out))
    assert out == SOURCE
    with pytest.raises(CorruptBlobError, match="layer"):
        open_zfile(MemoryBlob(damaged, "layer")).read_into(0, memoryview(out))


@checked
def test_a_flipped_bit_in_every_block_and_its_crc(data: bytes) -> None:
    reader = open_zfile(MemoryBlob(data))
    offsets = reader._table.boundaries(0, reader.header.index_size)
    for block, (begin, end) in enumerate(pairwise(offsets)):
        for byte in (begin, (begin + end) // 2, end - 5, end - 4, end - 1):
            damaged = open_zfile(MemoryBlob(flip(data, 8 * byte + 3), "layer"))
            size = reader.header.block_size
            for offset in (block * size, max(0, block * size - size)):
                with pytest.raises(CorruptBlobError, match=rf"layer: .*block {block}, .* at offset {begin}\b"):
                    damaged.read_at(offset, min(2 * size, reader.size - offset))
            # The other blocks are as good as before.
            if block:
                assert damaged.read_at(0, size) == SOURCE[:size]


@checked
@settings(deadline=None)
@given(length=st.integers(0, 20_000))
def test_cut_short_anywhere(data: bytes, length: int) -> None:
    with pytest.raises(FormatError, match="layer: "):
        read_all(data[: length * (len(data) - 1) // 20_000])


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 32), data=st.sampled_from(["input.zstd.16.zfile", "text.lz4.4.nocrc.zfile"]))
def test_overwritten_stretches_never_crash(seed: int, data: str) -> None:
    source = random.Random(seed)
    changed = bytearray(golden(data))
    for _ in range(source.randint(1, 4)):
        begin = source.randrange(len(changed))
        if source.random() < 0.5:  # header, trailer and index are small, and the places to look at
            begin = source.choice([0, len(changed) - 700]) + source.randrange(96)
        stretch = source.randbytes(source.choice([1, 4, 8, 100]))
        changed[begin : begin + len(stretch)] = stretch
    try:
        reader = open_zfile(MemoryBlob(changed))
        for offset in range(0, reader.size, 50_000):
            length = min(50_000, reader.size - offset)
            assert len(reader.read_at(offset, length)) == length
    except ObdlabError:
        pass


def test_without_crc_a_damaged_block_has_its_length_or_an_error() -> None:
    data = golden("text.lz4.4.nocrc.zfile")
    refused = 0
    for bit in range(8 * 512, 8 * 20_000, 97):
        reader = open_zfile(MemoryBlob(flip(data, bit)))
        try:
            assert len(reader.read_at(0, reader.size)) == 300_001
        except CorruptBlobError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("lives", [1, 2, 3])
def test_a_damaged_cache_is_evicted_and_asked_again(lives: int) -> None:
    data = CHECKED["lz4"]
    begin, end = open_zfile(MemoryBlob(data))._table.boundaries(5, 6)
    for offset, length in ((0, len(SOURCE)), (5 * 4096, 4096), (5 * 4096 + 5, 10), (5 * 4096 - 1, 2)):
        blob = CachingBlob(flip(data, 8 * begin + 77), data, lives)
        reader = open_zfile(blob)
        assert reader.read_at(offset, length) == SOURCE[offset : offset + length]
        assert blob.evictions == [(begin, end - begin)] * lives
        assert reader.read_at(offset, length) == SOURCE[offset : offset + length]
        assert len(blob.evictions) == lives, "once repaired it is not asked again"


def test_a_blob_that_stays_damaged_is_given_up() -> None:
    data = CHECKED["zstd"]
    begin, _ = open_zfile(MemoryBlob(data))._table.boundaries(1, 2)
    blob = CachingBlob(flip(data, 8 * begin), data, lives=99)
    reader = open_zfile(blob)
    wanted = rf"cached blob: CRC of ZFile block does not match \(block 1, .* read 4 times\) at offset {begin}"
    with pytest.raises(CorruptBlobError, match=wanted):
        reader.read_at(16384, 100)
    assert len(blob.evictions) == 3


@pytest.mark.parametrize("place", ["header", "index"])
def test_a_damaged_header_or_index_is_asked_again(place: str) -> None:
    data = CHECKED["lz4"]
    header = open_zfile(MemoryBlob(data)).header
    byte = 60 if place == "header" else header.index_offset + 3
    blob = CachingBlob(flip(data, 8 * byte), data, lives=2)
    with open_zfile(blob) as reader:
        assert reader.read_at(0, len(SOURCE)) == SOURCE
    assert blob.evictions == [(0, len(data))] * 2
    with pytest.raises(CorruptBlobError, match=re.escape(f"cached blob: ZFile {place}")):
        open_zfile(CachingBlob(flip(data, 8 * byte), data, lives=3))


def test_what_is_no_zfile() -> None:
    for data in (b"", bytes(100), bytes(5000), golden("text.bin")):
        with pytest.raises(FormatError, match=r"layer: (too short for a ZFile|no ZFile magic)"):
            open_zfile(MemoryBlob(data, "layer"))
    trailer_first = CHECKED["lz4"][-512:] + CHECKED["lz4"][512:]
    with pytest.raises(FormatError, match="layer: ZFile starts with a trailer"):
        open_zfile(MemoryBlob(trailer_first, "layer"))


@pytest.mark.parametrize(
    "claims",
    [
        {"index_size": 1_000_000_000},
        {"index_size": 1_000_000_000, "original_size": 1_000_000_000 * 4096},
        {"index_size": 1 << 63, "original_size": 1 << 63},
        {"index_size": 1 << 60, "original_size": 1 << 60, "block_size": 1},
        {"index_size": 1_000_000_001, "original_size": 1_000_000_001, "block_size": 1},
        {"original_size": (1 << 64) - 1},
        {"block_size": (1 << 32) - 1, "original_size": 1 << 40, "index_size": 257},
        {"index_offset": (1 << 64) - 4},
        {"dict_size": (1 << 32) - 1, "use_dict": 1},
    ],
    ids=str,
)
def test_claims_of_a_small_file_cost_nothing(claims: dict[str, int]) -> None:
    data = CHECKED["lz4"]
    header = ZFileHeader.from_bytes(data[:512])
    claiming = replace(header, **claims).to_bytes() + data[512:]  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="layer: ZFile "):
            open_zfile(MemoryBlob(claiming, "layer"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
