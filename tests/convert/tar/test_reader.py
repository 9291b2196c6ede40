from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.convert.tar.member import Kind
from obdlab.convert.tar.reader import TarStream
from obdlab.errors import FormatError
from tests.convert.images import base
from tests.convert.layouts import Member, directory, member, tar_bytes
from tests.convert.torture import gnu_only_layer, torture_tars

if TYPE_CHECKING:
    from obdlab.convert.tar.member import Member as Found


def read(data: bytes) -> list[tuple[Found, bytes]]:
    stream = TarStream(io.BytesIO(data), "layer")
    found = []
    for one in stream:
        content = bytearray(min(one.size, 1 << 20))
        for offset, piece in stream.data(one) if one.kind is Kind.FILE else ():
            assert offset + len(piece) <= one.size
            content[offset : offset + len(piece)] = piece
        found.append((one, bytes(content)))
    stream.drain()
    return found


def test_members_come_as_they_were_written() -> None:
    members = base()
    for (info, data), (got, content) in zip(members, read(tar_bytes(members)), strict=True):
        assert got.name.rstrip(b"/") == info.name.encode("utf-8", "surrogateescape").rstrip(b"/")
        assert (got.mode, got.uid, got.gid) == (info.mode, info.uid, info.gid)
        assert content == data
        assert got.link == info.linkname.encode("utf-8", "surrogateescape")


def test_xattrs_keep_their_bytes() -> None:
    values = {"security.capability": bytes(range(256)), "user.empty": b"", "user.newline": b"1\n2=3\n"}
    ((got, _),) = read(tar_bytes([member("x", xattrs=values)]))
    assert {name.decode(): value for name, value in got.xattrs} == values


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("1700000000.1234567899", 1_700_000_000_123_456_789),
        ("1700000000.5", 1_700_000_000_500_000_000),
        ("1700000000", 1_700_000_000_000_000_000),
        ("0", 0),
        ("-3.25", 0),
        ("nan", 0),
        ("inf", 0),
        ("99999999999", 0),
        ("", 0),
    ],
)
def test_pax_times(text: str, wanted: int) -> None:
    ((got, _),) = read(tar_bytes([member("x", pax={"mtime": text})]))
    assert got.mtime_ns == wanted
    assert got.atime_ns == wanted


def test_later_atime_is_kept() -> None:
    ((got, _),) = read(tar_bytes([member("x", mtime=5, pax={"atime": "9.5"})]))
    assert (got.mtime_ns, got.atime_ns) == (5 * 10**9, 9_500_000_000)


def test_global_headers_are_ignored() -> None:
    first, second = tar_bytes([member("a", b"1")]), tar_bytes([member("b", b"2")])
    extra = tarfile.TarInfo.create_pax_global_header({"path": "evil", "uid": "7", "SCHILY.xattr.user.x": "1"})
    found = read(extra + first[:1024] + extra + second)
    assert [(m.name, m.uid, m.xattrs, data) for m, data in found] == [(b"a", 0, (), b"1"), (b"b", 0, (), b"2")]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats(tar_format: int) -> None:
    long = "d" * 90 + "/" + "f" * 90
    ((got, data),) = read(tar_bytes([member(long, b"x" * 700, uid=1234)], tar_format=tar_format))
    assert (got.name, got.uid, data) == (long.encode(), 1234, b"x" * 700)


@pytest.mark.parametrize("data", [b"", bytes(512), bytes(1024), bytes(10240)])
def test_empty_layers(data: bytes) -> None:
    assert read(data) == []


def test_old_directories_have_a_slash() -> None:
    info = tarfile.TarInfo("old/")
    info.type = tarfile.AREGTYPE
    ((got, _),) = read(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    assert (got.kind, got.name) == (Kind.DIRECTORY, b"old")


def gnu_sparse() -> bytes:
    # One data piece of 512 bytes at 4096 in a file of 10000 bytes (GNU tar's old sparse format).
    info = tarfile.TarInfo("holes")
    info.type = tarfile.GNUTYPE_SPARSE
    info.size = 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % 4096, b"%011o\0" % 512
    header[483:495] = b"%011o\0" % 10_000
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"D" * 512 + bytes(1024)


@pytest.mark.parametrize(
    ("at", "field"),
    [
        (398, b"\xff" * 12),  # one byte less than none
        (386, b"\xff" * 12),
        (386, b"%011o\0" % 9_900),
        (398, b"\x80" + b"\x7f" * 11),
    ],
)
def test_sparse_maps_that_lead_out_of_the_file(at: int, field: bytes) -> None:
    header = bytearray(gnu_sparse())
    header[at : at + 12] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    with pytest.raises(FormatError, match="sparse file has data outside"):
        read(bytes(header))


def test_sparse_files() -> None:
    ((got, data),) = read(gnu_sparse())
    assert got.sparse
    assert data == bytes(4096) + b"D" * 512 + bytes(10_000 - 4608)


def damaged(change: int, value: int) -> bytes:
    data = bytearray(tar_bytes([member("a", b"1" * 600), member("b", b"2"), directory("c")]))
    data[change] ^= value
    return bytes(data)


@pytest.mark.parametrize("offset", [0, 100, 148, 257])
def test_damaged_header_in_the_middle_is_an_error(offset: int) -> None:
    # The header of the second member, which tarfile would take for the end.
    with pytest.raises(FormatError) as caught:
        read(damaged(512 + 1024 + offset, 0x41))
    assert caught.value.blob == "layer"
    assert caught.value.offset == 512 + 1024 + 512


@pytest.mark.parametrize("length", [511, 513, 600, 1024, 1537, 2000, 2047])
def test_truncated(length: int) -> None:
    with pytest.raises(FormatError):
        read(damaged(0, 0)[:length])


def oversized(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type = kind
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME]
)
def test_header_bombs(kind: bytes) -> None:
    with pytest.raises(FormatError, match="at most 1048576"):
        read(oversized(kind, 8 << 30) + bytes(1 << 16))


def test_endless_chain_of_headers() -> None:
    one = oversized(tarfile.GNUTYPE_LONGNAME, 2) + b"a\0".ljust(512, b"\0")
    with pytest.raises(FormatError):
        read(one * 5000)


@pytest.mark.parametrize(
    "bad",
    [
        member("x", pax={"size": "-512"}),
        member("x", pax={"size": str(1 << 70)}),
        member("x", pax={"uid": "4294967295"}),
        member("x", pax={"gid": "-1"}),
        member("x", kind=tarfile.CHRTYPE, rdev=(1 << 15, 0)),
        member("x", xattrs={"": b"1"}),
        member("x", pax={"path": "a\0b"}),
    ],
)
def test_values_out_of_range(bad: Member) -> None:
    with pytest.raises(FormatError):
        read(tar_bytes([bad, member("next", b"x")]))


SAMPLE = tar_bytes(base()) + gnu_sparse()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255)), min_size=1, max_size=6))
def test_mutated_bytes_give_members_or_a_format_error(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for offset, value in changes:
        data[offset] ^= value
    try:
        read(bytes(data))
    except FormatError as error:
        assert error.blob == "layer"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(SAMPLE)), st.binary(max_size=600))
def test_spliced_bytes_give_members_or_a_format_error(at: int, extra: bytes) -> None:
    try:
        read(SAMPLE[:at] + extra + SAMPLE[at:])
    except FormatError as error:
        assert error.blob == "layer"


def slowly(data: bytes) -> list[tuple[Found, bytes]]:
    """What tarfile alone makes of it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TarStream, "_quickly", lambda stream, header: None)
        return read(data)


def test_what_is_read_without_tarfile_is_the_same() -> None:
    for sample in (SAMPLE, gnu_only_layer(), *torture_tars(40)):
        assert read(sample) == slowly(sample)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([0, 99, 100, 108, 116, 124, 136, 156, 157, 257, 263, 345, 499]),
    st.binary(min_size=1, max_size=12),
    st.integers(0, 40),
)
def test_damaged_headers_are_not_read_differently(field: int, value: bytes, which: int) -> None:
    data = bytearray(SAMPLE)
    at = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"][which]
    data[at + field : at + field + len(value)] = value
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    try:
        found = slowly(bytes(data))
    except FormatError:
        return
    try:
        assert read(bytes(data)) == found
    except FormatError as error:
        assert "damaged pax header" in str(error)  # tarfile is less strict there


# Numbers of a header, with a right checksum: what a bit flip does not reach.
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([100, 108, 116, 124, 136, 329, 337, 386, 398, 483]),
    st.binary(min_size=8, max_size=12),
    st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"S", b"x", b"g", b"L", b"K", b"\0", b"7", b"V"]),
)
def test_hostile_headers(field: int, value: bytes, kind: bytes) -> None:
    header = bytearray(tarfile.TarInfo("name").tobuf(tarfile.GNU_FORMAT))
    header[field : field + len(value)] = value
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    try:
        read(bytes(header) + b"12 path=abc\n".ljust(512, b"\0") + SAMPLE[:4096])
    except FormatError as error:
        assert error.blob == "layer"


def test_huge_sparse_file_takes_no_time() -> None:
    pax = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "4096,3"}
    ((got, _),) = read(tar_bytes([member("x", b"abc", pax={**pax, "GNU.sparse.size": str(1 << 60)})]))
    assert (got.size, got.sparse) == (1 << 60, True)


@pytest.mark.parametrize("extents", ["-5,3", "9998,3", "0,-3", "0,3,0,512", "4611686018427387904,3"])
def test_sparse_maps_that_lie(extents: str) -> None:
    pax = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": "10000", "GNU.sparse.map": extents}
    with pytest.raises(FormatError):
        read(tar_bytes([member("x", b"abc", pax=pax), member("next", b"1")]))


def test_endless_sparse_map() -> None:
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s", "GNU.sparse.realsize": "1"}
    digits = b"9" * 60 + b"\n"
    body = b"100000000\n" + digits * (9_000_000 // len(digits))
    with pytest.raises(FormatError, match="headers of one member are longer"):
        read(tar_bytes([member("s", body, pax=pax)]))
