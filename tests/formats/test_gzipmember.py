"""Headers of gzip members, and empty blocks that let any inflater begin inside a byte."""

from __future__ import annotations

import gzip
import io
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isal import isal_zlib

from obdlab.errors import FormatError
from obdlab.formats.gzipmember import MAX_HEADER, begin_inside_byte, header_length, parse_trailer

FIXED = b"\x1f\x8b\x08%c\x00\x00\x00\x00\x00\xff"


def header(*, extra: bytes | None = None, name: bytes = b"", comment: bytes = b"", crc: bool = False) -> bytes:
    flags = (4 if extra is not None else 0) | (8 if name else 0) | (16 if comment else 0) | (2 if crc else 0)
    data = FIXED % flags
    if extra is not None:
        data += len(extra).to_bytes(2, "little") + extra
    data += (name + b"\0" if name else b"") + (comment + b"\0" if comment else b"")
    return data + (zlib.crc32(data) & 0xFFFF).to_bytes(2, "little") * crc


@given(
    extra=st.none() | st.binary(max_size=300),
    name=st.binary(max_size=20).filter(lambda text: b"\0" not in text),
    comment=st.binary(max_size=20).filter(lambda text: b"\0" not in text),
    crc=st.booleans(),
)
def test_a_header_of_any_fields_has_the_length_that_zlib_finds(
    extra: bytes | None, name: bytes, comment: bytes, crc: bool
) -> None:
    data = header(extra=extra, name=name, comment=comment, crc=crc)
    body = zlib.compress(b"content", wbits=-15)
    member = data + body + zlib.crc32(b"content").to_bytes(4, "little") + (7).to_bytes(4, "little")
    assert gzip.decompress(member) == b"content"
    assert header_length(member) == len(data)
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            header_length(data[:cut])


@pytest.mark.parametrize(
    "data", [b"", b"\x1f\x8b", b"\x1f\x8b\x07" + bytes(20), b"\x1f\x8b\x08\xe0" + bytes(20), b"PK\3\4" + bytes(20)]
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="blob: not a gzip header at offset 9"):
        header_length(data, blob="blob", offset=9)


def test_a_name_without_end_is_refused() -> None:
    with pytest.raises(FormatError, match="cut short, or too long"):
        header_length((FIXED % 8).ljust(MAX_HEADER, b"a"))


def test_a_trailer() -> None:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as file:
        file.write(b"abc")
    assert parse_trailer(stream.getvalue()[-8:]) == (zlib.crc32(b"abc"), 3)


@pytest.mark.parametrize("bits", range(8))
def test_a_stream_begins_at_any_bit(bits: int) -> None:
    # A stream whose first byte has only its upper `bits` bits: what was before them is another block's.
    content = random.Random(bits).randbytes(100) * 5
    stream = int.from_bytes(zlib.compress(content, wbits=-15), "little")
    for before in (0, 0xFF >> bits):
        shifted = (stream << (8 - bits) % 8 | (before if bits else 0)).to_bytes(700, "little")
        begin = begin_inside_byte(shifted[0], bits) + shifted[1 if bits else 0 :]
        for each in (zlib, isal_zlib):
            assert each.decompressobj(-15).decompress(begin) == content
