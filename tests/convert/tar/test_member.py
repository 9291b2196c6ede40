"""Plain headers are read without tarfile, and only sound ones."""

from __future__ import annotations

import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.convert.tar.member import Kind, plain_member, plain_size

NAMES = st.text(st.characters(codec="ascii", exclude_characters="\0/"), min_size=1, max_size=90)
TYPES = {tarfile.REGTYPE: Kind.FILE, tarfile.DIRTYPE: Kind.DIRECTORY, tarfile.SYMTYPE: Kind.SYMLINK}


@st.composite
def infos(draw: st.DrawFn) -> tarfile.TarInfo:
    info = tarfile.TarInfo(draw(NAMES))
    info.type = draw(st.sampled_from(list(TYPES)))
    info.mode = draw(st.integers(0, 0o7777))
    info.uid, info.gid = draw(st.integers(0, 0o777_7777)), draw(st.integers(0, 0o777_7777))
    info.mtime = draw(st.integers(0, (1 << 33) - 1))
    info.size = draw(st.integers(0, (1 << 33) - 1)) if info.type == tarfile.REGTYPE else 0
    info.linkname = draw(NAMES) if info.type == tarfile.SYMTYPE else ""
    return info


@given(infos(), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]))
def test_a_plain_header_is_read_as_it_was_written(info: tarfile.TarInfo, tar_format: int) -> None:
    header = info.tobuf(tar_format)
    member = plain_member(header, 512)
    assert member is not None
    assert (member.name, member.kind, member.offset) == (info.name.encode(), TYPES[info.type], 512)
    assert (member.mode, member.uid, member.gid, member.size) == (info.mode, info.uid, info.gid, info.size)
    assert member.link == info.linkname.encode()
    # A time beyond the year 2262 has no place in 64 bits of nanoseconds.
    assert member.mtime_ns == (info.mtime * 10**9 if info.mtime * 10**9 < 1 << 63 else 0)
    assert plain_size(header) == info.size


@given(infos(), st.integers(0, 511), st.integers(1, 255))
def test_a_header_with_one_wrong_byte_is_not_read_as_another(info: tarfile.TarInfo, at: int, change: int) -> None:
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    before = plain_member(bytes(header), 0)
    header[at] = (header[at] + change) % 256
    assert plain_member(bytes(header), 0) in (None, before)
    assert plain_size(bytes(header)) in (None, info.size)


@pytest.mark.parametrize("off", [-256, -1, 1, 256])
def test_a_checksum_that_is_off_is_refused(off: int) -> None:
    info = tarfile.TarInfo("x" * 90)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    checksum = int(header[148:154], 8)
    assert plain_member(header, 0) is not None
    header = header[:148] + b"%06o\0 " % (checksum + off) + header[156:]
    assert plain_member(header, 0) is None
    assert plain_size(header) is None


@pytest.mark.parametrize(
    "field", [b"-0000000001\0", b"0000000000x\0", b"\x80" + bytes(10) + b"\1", b"1e3".ljust(12, b"\0")]
)
@pytest.mark.parametrize("at", [124, 136])
def test_numbers_that_are_not_plain_are_left_to_the_careful_reader(field: bytes, at: int) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[at : at + 12] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert plain_member(bytes(header), 0) is None
    if at == 124:
        assert plain_size(bytes(header)) is None
