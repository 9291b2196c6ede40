"""ZFile header and trailer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.zfile import Algorithm
from obdlab.formats.zfile.layout import Flags, ZFileHeader, is_zfile
from tests.layers.zfile_samples import golden

# Header of an empty 1 GiB layer committed with -z by the original.
COMMIT_HEADER = ZFileHeader(
    flags=0x1B,
    index_offset=766,
    index_size=2,
    original_size=8192,
    index_crc=0x1D97CB16,
    block_size=4096,
    algorithm=Algorithm.LZ4,
    verify=True,
)

u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u8 = st.integers(0, 255)
headers = st.builds(
    ZFileHeader,
    flags=u64,
    block_size=u32,
    algorithm=u8,
    verify=st.booleans(),
    index_offset=u64,
    index_size=u64,
    original_size=u64,
    index_crc=u32,
    level=u8,
    use_dict=u8,
    dict_size=u32,
)


def test_header_of_an_original_commit() -> None:
    data = COMMIT_HEADER.to_bytes()
    assert len(data) == 512
    assert data[:24].hex() == "5a46696c65000100" + "74756a692e79796640416c6962616261"
    assert data[24:28] == (96).to_bytes(4, "little")
    assert data[28:32] == (0x38861C5E).to_bytes(4, "little")
    assert ZFileHeader.from_bytes(data) == COMMIT_HEADER


def test_golden_header_and_trailer() -> None:
    data = golden("text.lz4.4.ow.zfile")
    header, trailer = ZFileHeader.from_bytes(data[:512]), ZFileHeader.from_bytes(data[-512:])
    assert header.flags == 0x1B
    assert trailer.flags == 0x16
    assert header.original_size == trailer.original_size == 300_001
    assert header.to_bytes() == data[:512]
    assert trailer.to_bytes() == data[-512:]


@settings(deadline=None)
@given(headers)
def test_bytes_round_trip(header: ZFileHeader) -> None:
    assert ZFileHeader.from_bytes(header.to_bytes()) == header


@settings(deadline=None)
@given(st.integers(0, 512 * 8 - 1))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    data = bytearray(COMMIT_HEADER.to_bytes())
    data[bit // 8] ^= 1 << bit % 8
    digest_bit = 32 * 8 + 4  # without it nothing is promised
    if bit == digest_bit:
        assert not ZFileHeader.from_bytes(bytes(data)).has_digest
    else:
        with pytest.raises(FormatError):
            ZFileHeader.from_bytes(bytes(data))


def test_blobs_older_than_the_digest_are_accepted() -> None:
    old = ZFileHeader(flags=0x7FFEA4640B43, index_offset=0xDEAD, index_size=0xBEEF)
    data = bytearray(old.to_bytes())
    data[28:32] = b"junk"
    header = ZFileHeader.from_bytes(bytes(data))
    assert header == old
    assert header.is_header
    assert not header.is_overwritten
    assert is_zfile(bytes(data))


def test_errors_name_blob_and_offset() -> None:
    with pytest.raises(FormatError, match=r"layer7: no ZFile magic at offset 99 \(got 0000"):
        ZFileHeader.from_bytes(bytes(512), blob="layer7", offset=99)
    with pytest.raises(FormatError, match=r"layer7: too short .* \(got 511, wanted 512\)"):
        ZFileHeader.from_bytes(COMMIT_HEADER.to_bytes()[:511], blob="layer7")
    with pytest.raises(CorruptBlobError, match=r"digest does not match at offset 0 \(got 0x"):
        ZFileHeader.from_bytes(COMMIT_HEADER.to_bytes()[:511] + b"x")


def test_detection() -> None:
    data = golden("one.lz4.4.zfile")
    assert is_zfile(data[:512])
    assert not is_zfile(data[:511])
    assert not is_zfile(bytes(512))
    assert not is_zfile(data[-512:]), "a trailer is no header"
    with pytest.raises(CorruptBlobError, match="some blob"):
        is_zfile(data[:100] + b"x" + data[101:512], blob="some blob")


def test_flags_are_tested_by_bit() -> None:
    assert ZFileHeader(flags=Flags.HEADER | 1 << 40).is_header
    assert ZFileHeader(flags=Flags.DIGEST).has_digest
