"""Headers, trailers and records: the bytes, and what is refused."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import FormatError, ObdlabError
from obdlab.formats.lsmt.layout import (
    MAX_SEALED_RECORDS,
    MAX_VIRTUAL_SIZE,
    NULL_UUID,
    STRUCT_SIZE,
    Flags,
    Header,
    Segments,
    Trailer,
    check_mapped,
    check_order,
    check_sealed_segments,
    check_sealed_trailer,
    decode_segments,
    encode_segments,
    encode_user_tag,
    filler_records,
    is_lsmt,
    normalise_uuid,
)

UUID = "01234567-89AB-CDEF-0123-456789ABCDEF"
SEALED_HEADER = Header(
    flags=Flags.HEADER | Flags.DATA | Flags.SEALED, virtual_size=1 << 30, uuid=UUID, user_tag=b"hi"
)
SEALED_TRAILER = Trailer(flags=Flags.DATA | Flags.SEALED, virtual_size=1 << 30, index_offset=8192, index_size=256)


def test_struct_fields_are_where_the_format_says() -> None:
    raw = replace(SEALED_HEADER, index_offset=0x1122, index_size=0x33, parent_uuid=UUID.lower()).to_bytes()
    assert len(raw) == 4096
    assert STRUCT_SIZE == 390
    assert raw[:8] == b"LSMT\x00\x01\x02\x00"
    assert struct.unpack_from("<Q", raw)[0] == 564050879402828
    assert raw[8:24].hex() == "657e63d29444084ca2d2c8ec4fcfae8a"
    assert struct.unpack_from("<IIQQQ", raw, 24) == (390, 7, 0x1122, 0x33, 1 << 30)
    assert raw[56:93] == UUID.encode() + b"\0"
    assert raw[93:130] == UUID.encode() + b"\0"
    assert raw[130:134] == b"\0\0\x01\x01"
    assert raw[134:390] == b"hi".ljust(256, b"\0")
    assert not any(raw[390:])


def test_no_uuid_is_36_zero_digits() -> None:
    assert SEALED_TRAILER.to_bytes()[56:93] == NULL_UUID.encode() + b"\0"


@given(
    flags=st.integers(0, 0x3F),
    virtual_size=st.integers(0, MAX_VIRTUAL_SIZE),
    uuid=st.uuids(),
    tag=st.binary(max_size=256),
    index=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
)
def test_round_trip(flags: int, virtual_size: int, uuid: object, tag: bytes, index: tuple[int, int]) -> None:
    kind = Header if flags & 1 else Trailer
    info = kind(
        flags=Flags(flags),
        virtual_size=virtual_size,
        uuid=str(uuid).upper(),
        user_tag=tag.rstrip(b"\0"),
        index_offset=index[0],
        index_size=index[1],
    )
    assert kind.from_bytes(info.to_bytes()) == info
    assert is_lsmt(info.to_bytes()) == bool(flags & 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "blob: LSMT header is cut short at offset 0 (got 0 bytes, wanted 390)"),
        (SEALED_HEADER.to_bytes()[:389], "blob: LSMT header is cut short at offset 0 (got 389 bytes, wanted 390)"),
        (
            b"X" + SEALED_HEADER.to_bytes()[1:],
            (
                "blob: LSMT header has a wrong magic at offset 0 "
                "(got 58534d5400010200657e63d29444084ca2d2c8ec4fcfae8a, "
                "wanted 4c534d5400010200657e63d29444084ca2d2c8ec4fcfae8a)"
            ),
        ),
        (SEALED_TRAILER.to_bytes(), "blob: LSMT header has the wrong type bit at offset 0 (got flags 0x6)"),
        (
            SEALED_HEADER.to_bytes()[:48] + b"\xff" * 8 + SEALED_HEADER.to_bytes()[56:],
            (
                "blob: LSMT virtual size is impossible at offset 48 (got 18446744073709551615, "
                f"wanted at most {MAX_VIRTUAL_SIZE})"
            ),
        ),
    ],
)
def test_bad_headers_are_named(data: bytes, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        Header.from_bytes(data, blob="blob")
    assert str(caught.value) == message


@given(st.integers(0, 389), st.integers(0, 255))
def test_any_byte_of_a_header_may_be_hostile(at: int, value: int) -> None:
    raw = bytearray(SEALED_HEADER.to_bytes())
    raw[at] = value
    try:
        Header.from_bytes(bytes(raw))
    except ObdlabError:
        assert at < 24 or at == 28 or 48 <= at < 56


def test_uuid_text() -> None:
    assert normalise_uuid("abcdef01-2345-6789-abcd-ef0123456789") == "ABCDEF01-2345-6789-ABCD-EF0123456789"
    assert normalise_uuid(None) == normalise_uuid("") == NULL_UUID
    for wrong in ("abc", UUID + "0", UUID.replace("-", "x"), "g" + UUID[1:], UUID + "\n"):
        with pytest.raises(ValueError, match="not a UUID"):
            normalise_uuid(wrong)


def test_what_does_not_fit_is_refused() -> None:
    assert encode_user_tag("é" * 128) == "é".encode() * 128
    with pytest.raises(ValueError, match="got 258 bytes"):
        encode_user_tag("é" * 129)
    with pytest.raises(ValueError, match="user tag"):
        replace(SEALED_HEADER, user_tag=b"x" * 257).to_bytes()
    with pytest.raises(ValueError, match="virtual size"):
        replace(SEALED_HEADER, virtual_size=-1).to_bytes()
    with pytest.raises(ValueError, match="flags do not belong to a trailer"):
        Trailer(flags=SEALED_HEADER.flags, virtual_size=0).to_bytes()
    with pytest.raises(ValueError, match=r"segment length does not fit \(got \[16384, 16384\]"):
        encode_segments(Segments.from_rows([(0, 16384, 8, False, 0)]))
    with pytest.raises(ValueError, match="segment offset"):
        encode_segments(Segments.from_rows([(2**50 - 1, 1, 8, False, 0)]))
    with pytest.raises(ValueError, match="segment mapped offset"):
        encode_segments(Segments.from_rows([(0, 1, 2**55, False, 0)]))


@pytest.mark.parametrize(
    ("row", "image"),
    [
        ((1, 1, 0, False, 0), "01000000000004000000000000000000"),
        ((0, 1, 1, False, 0), "00000000000004000100000000000000"),
        ((0, 1, 0, True, 0), "00000000000004000000000000008000"),
        ((0, 1, 0, False, 0xAB), "000000000000040000000000000000ab"),
        ((929, 22, 8, False, 0), "a1030000000058000800000000000000"),
        ((2**50 - 2, 16383, 2**55 - 1, True, 255), "feffffffffffffffffffffffffffffff"),
    ],
)
def test_record_images(row: tuple[int, int, int, bool, int], image: str) -> None:
    assert encode_segments(Segments.from_rows([row])).hex() == image
    assert decode_segments(bytes.fromhex(image)).rows() == [row]


def test_fillers_and_empty_records_mean_nothing() -> None:
    assert filler_records(1).hex() == "ffffffffffff03000000000000000000"
    real = encode_segments(Segments.from_rows([(5, 2, 8, False, 0)]))
    empty = struct.pack("<QQ", 3, 8)
    assert decode_segments(filler_records(2) + real + empty + filler_records(1)).rows() == [(5, 2, 8, False, 0)]
    assert decode_segments(b"").rows() == []


@given(st.binary(max_size=400))
def test_any_bytes_decode_and_encode_again(data: bytes) -> None:
    data = data[: len(data) // 16 * 16]
    segments = decode_segments(data)
    kept = [
        data[i : i + 16]
        for i in range(0, len(data), 16)
        if int.from_bytes(data[i : i + 8], "little") >> 50
        and int.from_bytes(data[i : i + 8], "little") & (2**50 - 1) != 2**50 - 1
    ]
    assert encode_segments(segments) == b"".join(kept)


def _check(rows: list[tuple[int, int, int, bool, int]]) -> None:
    check_sealed_segments(Segments.from_rows(rows), 8192, blob="b")


def test_sealed_segments_at_the_edges_are_good() -> None:
    _check([])
    _check([(0, 8, 8, False, 0), (8, 8, 8, False, 0), (16, 16000, 16, True, 0)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [(0, 4, 8, False, 0), (3, 1, 8, False, 0)],
            "b: LSMT index record 1 is out of order at offset 8192 (got sector 3, wanted at least 4)",
        ),
        (
            [(8, 1, 8, False, 0), (0, 1, 8, False, 0)],
            "b: LSMT index record 1 is out of order at offset 8192 (got sector 0, wanted at least 9)",
        ),
        (
            [(0, 4, 7, False, 0)],
            (
                "b: LSMT index record 0 points outside of the layer's data at offset 8192 "
                "(got sectors [7, 11), wanted inside [8, 16))"
            ),
        ),
        (
            [(0, 4, 13, False, 0)],
            (
                "b: LSMT index record 0 points outside of the layer's data at offset 8192 "
                "(got sectors [13, 17), wanted inside [8, 16))"
            ),
        ),
        (
            [(0, 4, 8, True, 0), (4, 4, 17, True, 0)],
            (
                "b: LSMT index record 1 points outside of the layer's data at offset 8192 "
                "(got sectors [17, 17), wanted inside [8, 16))"
            ),
        ),
        (
            [(0, 4, 2**55 - 1, False, 0)],
            (
                "b: LSMT index record 0 points outside of the layer's data at offset 8192 "
                "(got sectors [36028797018963967, 36028797018963971), wanted inside [8, 16))"
            ),
        ),
    ],
)
def test_bad_sealed_segments_are_named(rows: list[tuple[int, int, int, bool, int]], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        _check(rows)
    assert str(caught.value) == message


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 6), st.integers(6, 18), st.booleans(), st.just(0)),
        max_size=5,
    )
)
def test_checks_agree_with_a_plain_loop(rows: list[tuple[int, int, int, bool, int]]) -> None:
    ordered = all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(rows))
    inside = all(
        8 <= moffset <= 16 if zeroed else (8 <= moffset < 16 and 8 < moffset + length <= 16)
        for _, length, moffset, zeroed, _ in rows
    )
    segments = Segments.from_rows(rows)
    for good, check in ((ordered, lambda: check_order(segments, 0)), (inside, lambda: check_mapped(segments, 16))):
        if good:
            check()
        else:
            with pytest.raises(FormatError):
                check()


@pytest.mark.parametrize(
    ("trailer", "message"),
    [
        (
            replace(SEALED_TRAILER, flags=Flags.DATA),
            "LSMT trailer is not that of a sealed data file at offset 12316 (got flags 0x2, wanted 0x6)",
        ),
        (
            replace(SEALED_TRAILER, index_size=MAX_SEALED_RECORDS + 1),
            "LSMT index has too many records at offset 12328 (got 1000001, wanted at most 1000000)",
        ),
        (
            replace(SEALED_TRAILER, index_size=257),
            "LSMT index lies outside of its place at offset 12320 (got [8192, 12304), wanted inside [4096, 12288))",
        ),
        (
            replace(SEALED_TRAILER, index_offset=2**64 - 16, index_size=1),
            (
                "LSMT index lies outside of its place at offset 12320 "
                "(got [18446744073709551600, 18446744073709551616), wanted inside [4096, 12288))"
            ),
        ),
        (
            replace(SEALED_TRAILER, index_offset=0, index_size=0),
            "LSMT index lies outside of its place at offset 12320 (got [0, 0), wanted inside [4096, 12288))",
        ),
    ],
)
def test_bad_trailers_are_named(trailer: Trailer, message: str) -> None:
    check_sealed_trailer(SEALED_TRAILER, 16384)
    with pytest.raises(FormatError) as caught:
        check_sealed_trailer(trailer, 16384)
    assert str(caught.value) == message


def test_columns() -> None:
    segments = Segments.from_rows([(0, 4, 8, False, 1), (4, 4, 12, True, 2)])
    assert segments.end_sectors.tolist() == [4, 8]
    assert segments.mapped_sectors.tolist() == [4, 0]
    assert segments[np.array([False, True])].rows() == [(4, 4, 12, True, 2)]
    assert len(segments[:1]) == 1


@pytest.mark.parametrize(("length", "wanted"), [(0, False), (24, False), (28, False), (29, True), (32, True)])
def test_29_bytes_tell_an_lsmt_file(length: int, wanted: bool) -> None:
    header = Header(flags=Flags.HEADER | Flags.DATA, virtual_size=4096).to_bytes()
    assert is_lsmt(header[:length]) is wanted
    assert not is_lsmt(header[:28] + bytes([header[28] & ~int(Flags.HEADER)]) + header[29:])


@pytest.mark.parametrize(
    ("size", "fits"), [(0, True), (-1, False), (MAX_VIRTUAL_SIZE, True), (MAX_VIRTUAL_SIZE + 1, False)]
)
def test_virtual_sizes(size: int, fits: bool) -> None:
    header = Header(flags=Flags.HEADER | Flags.DATA, virtual_size=size)
    if fits:
        assert Header.from_bytes(header.to_bytes()).virtual_size == size
        return
    with pytest.raises(ValueError, match="virtual size"):
        header.to_bytes()
