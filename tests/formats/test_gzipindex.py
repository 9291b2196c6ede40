"""Gzip indexes as the original writes them: read, written bit by bit, and refused when damaged."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.gzipindex import (
    ENTRY,
    HEADER_SIZE,
    WINDOW,
    IndexHeader,
    pack,
    parse_table,
    parse_window,
    table_bytes,
)
from tests.layers.golden import TURBO

INDEXES = sorted(path.name for path in TURBO.glob("*.gzip.meta"))
GOOD = (TURBO / "good.gzip.meta").read_bytes()
HEADER = IndexHeader.from_bytes(GOOD, index_size=len(GOOD))
TABLE = parse_table(GOOD[HEADER.index_start :], HEADER)


def with_field(offset: int, value: bytes) -> bytes:
    data = bytearray(GOOD)
    data[offset : offset + len(value)] = value
    data[329:333] = raw_crc32c(bytes(data[:329])).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("name", INDEXES)
def test_what_the_original_wrote_is_read_and_written_bit_by_bit(name: str) -> None:
    data = (TURBO / name).read_bytes()
    header = IndexHeader.from_bytes(data, index_size=len(data), blob=name)
    assert header.to_bytes() == data[:HEADER_SIZE]
    table = parse_table(data[header.index_start :], header, blob=name)
    assert len(table) == header.entries
    windows = [
        parse_window(
            data[row["window"] : row["window"] + row["length"]], header, blob=name, offset=int(row["window"])
        )
        for row in table
    ]
    assert windows[0] == bytes(WINDOW)
    again = b"".join(map(pack, windows)) + pack(table_bytes([tuple(row.tolist()) for row in table]))
    assert again == data[HEADER_SIZE:]


def test_a_header_field_by_field() -> None:
    assert IndexHeader(1, 4, 487422, 4106240, len(GOOD), 12808) == HEADER
    assert HEADER.span == 1 << 20
    assert GOOD[:8] == b"ddgzidx\0"
    assert GOOD[8:13] == bytes([1, 0, 1, 6, 0])
    assert TABLE["content"].tolist()[0] == 0
    assert TABLE["stored"].tolist()[0] == 23054  # behind the gzip header, which has a long comment
    assert TABLE["window"].tolist()[0] == 333
    assert ENTRY.itemsize == 29


@pytest.mark.parametrize("cut", [0, 100, 332])
def test_a_cut_header_is_refused(cut: int) -> None:
    with pytest.raises(FormatError, match=f"index: gzip index is cut short .got {cut}, wanted at least 333."):
        IndexHeader.from_bytes(GOOD[:cut], index_size=cut, blob="index")


@pytest.mark.parametrize("size", [333, len(GOOD) // 2, len(GOOD) - 1, len(GOOD) + 16])
def test_a_file_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(FormatError, match=f"size of the index file .*got {len(GOOD)}, wanted {size}"):
        IndexHeader.from_bytes(GOOD, index_size=size)


@pytest.mark.parametrize("bit", range(HEADER_SIZE * 8))
def test_every_flipped_bit_of_the_header_is_found(bit: int) -> None:
    data = bytearray(GOOD)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FormatError):
        IndexHeader.from_bytes(bytes(data), index_size=len(data))


@pytest.mark.parametrize(
    ("offset", "value", "what"),
    [
        (8, b"\3", "version"),
        (10, b"\2", "compression of windows"),
        (17, (65536).to_bytes(4, "little"), "window"),
        (21, b"\x1e", "entry size"),
        (25, bytes(8), "number of entries"),
        (25, (1 << 40).to_bytes(8, "little"), "number of entries"),
        (25, b"\xff" * 8, "number of entries"),
        (49, (1 << 40).to_bytes(8, "little"), "cannot hold"),
        (49, b"\xff" * 8, "cannot hold"),
        (313, (1 << 40).to_bytes(8, "little"), "end of the table"),
    ],
)
def test_impossible_fields_are_refused(offset: int, value: bytes, what: str) -> None:
    data = with_field(offset, value)
    with pytest.raises(FormatError, match=what) as caught:
        IndexHeader.from_bytes(data, index_size=len(data))
    assert not isinstance(caught.value, CorruptBlobError)


def changed(number: int, **fields: int) -> NDArray[np.void]:
    table = TABLE.copy()
    for field, value in fields.items():
        table[field][number] = value
    return table


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (changed(0, content=1), "the first entry is not at the start"),
        (changed(1, content=-1), "offset in the content of entry 0"),
        (changed(2, content=int(TABLE["content"][1]) - 1), "offset in the content of entry 1"),
        (changed(3, content=HEADER.uncompressed_size + 1), "offset in the content of entry 3"),
        (changed(3, content=1 << 62), "offset in the content of entry 3"),
        (changed(0, stored=0), "offset in the gzip file of entry 0"),
        (changed(2, stored=-(1 << 63)), "offset in the gzip file of entry"),
        (changed(3, stored=HEADER.compressed_size + 1), "offset in the gzip file of entry 3"),
        (changed(1, bits=8), "bits of entry 1"),
        (changed(1, stored=23054, bits=7), "place in the gzip file of entry 0"),
        (changed(0, window=332), "offset of the window of entry 0"),
        (changed(3, window=HEADER.index_start + 1), "offset of the window of entry 3"),
        (changed(1, length=0), "length of the window of entry 1"),
        (changed(1, length=1 << 31), "length of the window of entry 1"),
        (changed(0, length=53), "end of the window of entry 0"),
        (changed(1, stored=23055), "rate of compression of entry 0"),
    ],
)
def test_impossible_entries_are_refused(table: NDArray[np.void], what: str) -> None:
    with pytest.raises(FormatError, match=what):
        parse_table(pack(table.tobytes()), HEADER)


def test_a_table_of_another_length_is_refused() -> None:
    for count in (0, 3, 5):
        rows = np.concatenate([TABLE, TABLE])[:count]
        with pytest.raises(FormatError, match=r"another size than its number of entries|end where it must"):
            parse_table(pack(rows.tobytes()), HEADER)
        with pytest.raises(FormatError, match=f"got {count * 29}, wanted 116"):
            parse_table(rows.tobytes(), replace(HEADER, windows_compressed=False))


@pytest.mark.parametrize("entries", [1, 5, 1000, 30_000])
def test_a_table_that_does_not_compress_is_not_too_long(entries: int) -> None:
    table = pack(random.Random(entries).randbytes(29 * entries))
    assert len(table) > 29 * entries
    start = HEADER_SIZE + 32 * entries
    header = IndexHeader(1, entries, 1000, 1000, start + len(table), start)
    assert IndexHeader.from_bytes(header.to_bytes(), index_size=header.index_size) == header


def test_a_table_that_unpacks_to_gigabytes_takes_no_memory() -> None:
    bomb = zlib.compressobj()
    data = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(64)) + bomb.flush()
    with pytest.raises(CorruptBlobError, match="does not end where it must"):
        parse_table(data, HEADER)


def test_damaged_windows_are_refused() -> None:
    start, length = int(TABLE["window"][1]), int(TABLE["length"][1])
    sound = GOOD[start : start + length]
    assert len(parse_window(sound, HEADER)) == WINDOW
    for at in range(0, length, 97):
        data = bytearray(sound)
        data[at] ^= 4
        with pytest.raises(CorruptBlobError, match=r"index: window of the gzip index .* offset 385"):
            parse_window(bytes(data), HEADER, blob="index", offset=start)
    for data in (sound[:-1], sound + b"\0", pack(bytes(WINDOW - 1)), pack(bytes(WINDOW + 1)), b""):
        with pytest.raises(CorruptBlobError):
            parse_window(data, HEADER)
    with pytest.raises(CorruptBlobError, match="wrong length of a window"):
        parse_window(bytes(100), replace(HEADER, windows_compressed=False))
