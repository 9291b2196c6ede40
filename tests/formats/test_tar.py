"""The tar envelope, against golden bytes and Python's own tarfile."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.formats.tar import TarWindow, file_header, parse_wrap, placeholder_header, wrap_header, wrap_tail
from tests.layers.zfile_samples import GOLDEN, golden

sizes = st.one_of(st.integers(0, 1 << 16), st.integers(0, 1 << 50), st.sampled_from([8**11 - 1, 8**11, 10**9]))


def tar_of(size: int, format_: int, name: str = "overlaybd.commit", kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = kind
    return info.tobuf(format_)


def with_checksum(header: bytes, *, signed: bool = False) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    total = sum(byte - 256 * (signed and byte > 127) for byte in blank)
    return header[:148] + b"%06o\0 " % total + header[156:]


@pytest.mark.parametrize("path", ["zfile/text.lz4.4.tar.zfile", "lsmt/l1.lz4tar.lsmt", "ext4/layer1.obd"])
def test_written_as_the_original_does(path: str) -> None:
    data = (GOLDEN / path).read_bytes()
    window = parse_wrap(data[:1536])
    assert window is not None
    assert window.offset == 1536
    assert wrap_header(window.size) == data[:1536]
    assert wrap_tail(window.size) == data[1536 + window.size :]


@settings(deadline=None)
@given(sizes)
def test_read_what_was_written(size: int) -> None:
    header = wrap_header(size)
    assert len(header) == 1536
    assert parse_wrap(header) == TarWindow(1536, size)
    assert (1536 + size + len(wrap_tail(size))) % 512 == 0
    assert not wrap_tail(size).strip(b"\0")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 99_999, 100_000])
def test_tarfile_reads_what_was_written(size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    with tarfile.open(fileobj=io.BytesIO(wrap_header(size) + content + wrap_tail(size))) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.size, member.uname, member.mtime) == ("overlaybd.commit", size, "root", 0)
        file = tar.extractfile(member)
        assert file is not None
        assert file.read() == content


def test_a_plain_ustar_header_is_enough() -> None:
    assert parse_wrap(tar_of(4_737_695, tarfile.USTAR_FORMAT)) == TarWindow(512, 4_737_695)


@pytest.mark.parametrize("size", [1, 8**10 - 1, 8**10, 5 * 8**10, 8**11 - 1])
def test_all_digits_of_the_size_count(size: int) -> None:
    assert parse_wrap(tar_of(size, tarfile.USTAR_FORMAT)) == TarWindow(512, size)


@pytest.mark.parametrize("size", [7, 5 * 8**10])
def test_a_size_that_no_record_gives_is_in_the_files_header(size: int) -> None:
    header = bytearray(wrap_header(0))
    header[512:1024] = b"7 a=bc\n".ljust(512, b"\0")
    header[124:136] = b"          7 "
    header[1024 + 124 : 1024 + 136] = b"%011o " % size
    wrapped = with_checksum(bytes(header[:512])) + header[512:1024] + with_checksum(bytes(header[1024:]))
    assert parse_wrap(wrapped) == TarWindow(1536, size)


@pytest.mark.parametrize(("name", "size"), [(b"trace", 0), (b"trace", 3480), (b"n" * 100, 8**11 - 1)])
def test_tarfile_reads_a_file_header(name: bytes, size: int) -> None:
    info = tarfile.TarInfo.frombuf(file_header(name, size), "utf-8", "strict")
    assert (info.name, info.size, info.mode, info.mtime) == (name.decode(), size, 0o444, 0)
    assert (info.uid, info.gid, info.type, info.devmajor, info.devminor) == (0, 0, tarfile.REGTYPE, 0, 0)


def test_a_placeholder_has_the_headers_form_and_no_magic() -> None:
    placeholder = placeholder_header()
    assert len(placeholder) == len(wrap_header(0))
    assert placeholder[512:1024] == wrap_header(0)[512:1024]  # the record of a size of zero
    assert b"ustar" not in placeholder


def test_sizes_of_8_gib_and_more_in_the_header() -> None:
    header = bytearray(tar_of(0, tarfile.USTAR_FORMAT))
    header[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    assert parse_wrap(with_checksum(bytes(header))) == TarWindow(512, 1 << 40)
    header[124:136] = b"\xff" * 12
    with pytest.raises(FormatError, match="tar size is not a number"):
        parse_wrap(with_checksum(bytes(header)))


def test_either_sum_of_the_old_tars_is_right() -> None:
    header = tar_of(77, tarfile.USTAR_FORMAT)
    header = b"\xfc" + header[1:]
    assert parse_wrap(with_checksum(header)) == TarWindow(512, 77)
    assert parse_wrap(with_checksum(header, signed=True)) == TarWindow(512, 77)


def test_what_is_not_a_tar() -> None:
    ustar = tar_of(77, tarfile.USTAR_FORMAT)
    assert parse_wrap(b"") is None
    assert parse_wrap(bytes(1536)) is None
    assert parse_wrap(ustar[:511]) is None
    assert parse_wrap(placeholder_header()) is None
    assert parse_wrap(golden("text.lz4.4.zfile")[:1536]) is None
    assert parse_wrap(tar_of(77, tarfile.GNU_FORMAT)) is None, "not recognised by the original either"
    assert parse_wrap(ustar[:148] + b"junk\0 77" + ustar[156:]) is None


@settings(deadline=None)
@given(st.integers(0, 511), st.integers(1, 255))
def test_a_changed_byte_is_noticed_by_the_checksum(offset: int, change: int) -> None:
    header = bytearray(tar_of(77, tarfile.USTAR_FORMAT))
    header[offset] ^= change
    unused_in_checksum = range(154, 156)  # its terminators
    if offset not in unused_in_checksum:
        assert parse_wrap(bytes(header)) in (None, TarWindow(512, 77) if 148 <= offset < 156 else None)


@pytest.mark.parametrize(
    ("kind", "name"), [(tarfile.DIRTYPE, "etc/"), (tarfile.SYMTYPE, "bin"), (tarfile.GNUTYPE_LONGNAME, "long")]
)
def test_an_ordinary_layer_is_refused(kind: bytes, name: str) -> None:
    header = with_checksum(tar_of(0, tarfile.USTAR_FORMAT, name, kind))
    with pytest.raises(FormatError, match=r"layer3: .* first entry is not a file.* at offset 156 \(got type b'"):
        parse_wrap(header, blob="layer3")


def pax(records: bytes, *, length: int | None = None, then: bytes | None = None) -> bytes:
    header = tar_of(len(records) if length is None else length, tarfile.USTAR_FORMAT, "pax", tarfile.XHDTYPE)
    file = tar_of(123, tarfile.USTAR_FORMAT) if then is None else then
    return header + records.ljust(512, b"\0") + file


@pytest.mark.parametrize(
    ("records", "size"),
    [
        (b"15 size=165367\n", 165_367),
        (b"", 123),
        (b"10 size=0\n", 123),
        (b"11 path=xy\n14 size=99999\n", 99_999),
        (b"11 size=12\n11 size=34\n", 34),
        (b"11 path= \n\n", 123),
    ],
)
def test_pax_records(records: bytes, size: int) -> None:
    assert parse_wrap(pax(records)) == TarWindow(1536, size)


@pytest.mark.parametrize(
    "records",
    [
        b"junk",
        b"15 size=165367 ",
        b"99 size=165367\n",
        b"14 size=165367\n",
        b"0 size=1\n",
        b"-5 size=1\n",
        b"9 size=x\n",
        b"10 size=-1\n",
        b"30 size=99999999999999999999\n\n",
        b"7 size\n",
    ],
)
def test_malformed_pax_records(records: bytes) -> None:
    with pytest.raises(FormatError, match=r"b: .*pax"):
        parse_wrap(pax(records), blob="b")


@pytest.mark.parametrize(("at", "offset"), [(124, 124), (1024 + 124, 1024 + 124)])
def test_the_error_names_the_place_of_a_damaged_number(at: int, offset: int) -> None:
    header = bytearray(wrap_header(5))
    header[at : at + 4] = b"junk"
    if at > 512:
        header[512:1024] = b"9 size=0\n".ljust(512, b"\0")
        header[124:136] = b"         11 "  # in octal
    wrapped = with_checksum(bytes(header[:512])) + header[512:1024] + with_checksum(bytes(header[1024:]))
    with pytest.raises(FormatError, match="not a number") as caught:
        parse_wrap(wrapped)
    assert caught.value.offset == offset


def test_pax_header_without_a_file_behind() -> None:
    for then in (b"", bytes(512), tar_of(0, tarfile.USTAR_FORMAT, "d", tarfile.DIRTYPE)):
        with pytest.raises(FormatError, match="no file header after the pax header of a tar at offset 1024"):
            parse_wrap(pax(b"", then=then))
    with pytest.raises(FormatError, match="too long"):
        parse_wrap(pax(b"", length=513))


@settings(deadline=None)
@given(st.data())
def test_rubbish_never_crashes(draw: st.DataObject) -> None:
    data = bytearray(pax(draw.draw(st.binary(max_size=60)), length=draw.draw(st.integers(0, 600))))
    for begin in (0, 1024):
        field = draw.draw(st.binary(min_size=12, max_size=12))
        if draw.draw(st.booleans()):
            data[begin + 124 : begin + 136] = field
        data[begin : begin + 512] = with_checksum(bytes(data[begin : begin + 512]))
    try:
        window = parse_wrap(bytes(data[: draw.draw(st.sampled_from([512, 1000, 1024, 1536]))]))
    except FormatError:
        return
    assert window is not None
    assert window.size >= 0
