"""The jump table: offsets as the sums of stored lengths, and nothing outside the blob."""

from __future__ import annotations

import struct
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.zfile.jumptable import JumpTable, check_bounds
from obdlab.formats.zfile.layout import Flags, ZFileHeader


def describe(lengths: list[int], **changes: int) -> tuple[bytes, ZFileHeader]:
    index = struct.pack(f"<{len(lengths)}I", *lengths)
    fields = {
        "index_offset": 512 + sum(lengths),
        "index_size": len(lengths),
        "original_size": 4096 * len(lengths),
        "index_crc": raw_crc32c(index),
    } | changes
    return index, ZFileHeader(flags=Flags.DATA | Flags.SEALED | Flags.DIGEST, **fields)


@settings(deadline=None)
@given(st.lists(st.integers(5, 4096 + 516), max_size=50), st.data())
def test_offsets_are_sums_of_lengths(lengths: list[int], data: st.DataObject) -> None:
    table = JumpTable.from_index(*describe(lengths))
    wanted = list(accumulate(lengths, initial=512))
    begin = data.draw(st.integers(0, len(lengths)))
    end = data.draw(st.integers(begin, len(lengths)))
    assert len(table) == len(lengths)
    assert table.boundaries(0, len(lengths)) == wanted
    assert table.boundaries(begin, end) == wanted[begin : end + 1]


def test_files_beyond_4_gib_keep_exact_offsets() -> None:
    count = 1_100_000
    index = np.full(count, 4100, dtype="<u4").tobytes()
    header = ZFileHeader(flags=Flags.DATA | Flags.SEALED, index_offset=1 << 33, index_size=count)
    table = JumpTable.from_index(index, header)
    assert table.boundaries(count - 1, count) == [512 + 4100 * (count - 1), 512 + 4100 * count]
    assert table.memory == 8 * (count + 1)
    half = JumpTable.from_index(index[: len(index) // 2], header)
    assert half.memory == 4 * (count // 2 + 1)


def test_data_starts_after_a_dictionary() -> None:
    table = JumpTable.from_index(*describe([100, 200], dict_size=1000, index_offset=2000))
    assert table.boundaries(0, 2) == [1512, 1612, 1812]


@pytest.mark.parametrize("length", [0, 1, 4, 4096 + 517, 0xFFFFFFFF])
def test_impossible_lengths(length: int) -> None:
    index, header = describe([100, length, 100], index_offset=1 << 40)
    with pytest.raises(
        FormatError, match=rf"b: .*block 1 at offset {(1 << 40) + 4} \(got {length}, wanted 5 to 4612"
    ):
        JumpTable.from_index(index, header, blob="b")


def test_lengths_without_crc_may_be_shorter() -> None:
    index, header = describe([1, 4], verify=False)
    assert JumpTable.from_index(index, header).boundaries(0, 2) == [512, 513, 517]
    with pytest.raises(FormatError, match="block 0"):
        JumpTable.from_index(*describe([0], verify=False))


def test_blocks_must_end_before_the_index() -> None:
    index, header = describe([100, 200], index_offset=811)
    with pytest.raises(FormatError, match=r"reach into the index \(got 812, wanted at most 811\)"):
        JumpTable.from_index(index, header)


def test_index_crc() -> None:
    index, header = describe([100, 200])
    with pytest.raises(CorruptBlobError, match="b: ZFile index CRC does not match at offset 812"):
        JumpTable.from_index(index[:-1] + b"\1", header, blob="b")
    unchecked = ZFileHeader(flags=header.flags & ~Flags.DIGEST, index_offset=812, index_crc=1)
    assert len(JumpTable.from_index(index, unchecked)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block size"),
        ({"block_size": 65537}, "block size"),
        ({"original_size": 8193}, r"got 2 blocks, wanted 3"),
        ({"original_size": 4096}, r"got 2 blocks, wanted 1"),
        ({"index_offset": 511}, "outside the blob"),
        ({"index_offset": 1025}, "outside the blob"),
        ({"dict_size": 1000}, "outside the blob"),
        ({"index_size": (1 << 64) - 1, "original_size": (1 << 64) - 1, "block_size": 1}, "too many blocks"),
    ],
)
def test_fields_that_disagree(changes: dict[str, int], message: str) -> None:
    size = 512 + 512 + 8 + 512
    _, header = describe([256, 256], **changes)
    with pytest.raises(FormatError, match=f"b: .*{message}"):
        check_bounds(header, size, blob="b")
    check_bounds(describe([256, 256])[1], size)
