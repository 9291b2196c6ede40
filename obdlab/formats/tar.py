"""The tar envelope of a layer blob, with which registries and containerd take it for an ordinary layer.

::

    0     pax header block, name "overlaybd.pax"
    512   pax record "<n> size=<bytes>\\n", zero padded
    1024  file header block, name "overlaybd.commit", its own size field 0
    1536  content
    ...   zeros up to a multiple of 512, then two zero blocks

Some blobs have only a plain ustar header: then the content starts at 512. Not a general tar reader.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from obdlab.errors import FormatError

BLOCK = 512
#: Bytes before the content, as written here; also the number of bytes that :func:`parse_wrap` needs.
WRAP_SIZE = 3 * BLOCK

# name, mode, uid, gid, size, mtime, checksum, typeflag, linkname, magic, version, uname, gname, ...
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s183x")
_CHECKSUM = slice(148, 156)
_DEVICE = slice(329, 345)
_PAX = b"x"
_FILE_TYPES = (b"0", b"\0", b"7")


class TarWindow(NamedTuple):
    """Where the wrapped content lies, in bytes."""

    offset: int
    size: int


def parse_wrap(first_bytes: bytes, *, blob: str = "") -> TarWindow | None:
    """Return where the content of a wrapped blob lies, or None if the blob is not a POSIX tar.

    ``first_bytes`` are the blob's first 1536, or all of it if it is shorter. As in the original, only "ustar" with
    version "00" and a right checksum counts as tar; GNU's own format does not. Raises FormatError for a tar whose
    first entry cannot be a layer: not a file, a malformed or oversized pax header. The window may end past the
    blob's end; the caller knows the blob's size.
    """
    header = first_bytes[:BLOCK]
    if not _is_header(header):
        return None
    kind = header[156:157]
    if kind in _FILE_TYPES:
        return TarWindow(BLOCK, _number(header[124:136], "size", 124, blob))
    if kind != _PAX:
        raise FormatError(
            "blob is a tar whose first entry is not a file, so not a wrapped layer",
            blob=blob,
            offset=156,
            got=f"type {kind!r}",
        )
    length = _number(header[124:136], "size of the pax header", 124, blob)
    if length > BLOCK:
        raise FormatError(
            "pax header of a wrapped layer is too long", blob=blob, offset=124, got=length, wanted=BLOCK
        )
    file_header = first_bytes[2 * BLOCK : WRAP_SIZE]
    if not _is_header(file_header) or file_header[156:157] not in _FILE_TYPES:
        raise FormatError("no file header after the pax header of a tar", blob=blob, offset=2 * BLOCK)
    size = _pax_size(first_bytes[BLOCK : BLOCK + length], blob)
    return TarWindow(WRAP_SIZE, size or _number(file_header[124:136], "size", 2 * BLOCK + 124, blob))


class TarMember(NamedTuple):
    """A member of a ustar: its name without the prefix field, its type and the bytes of its content."""

    name: bytes
    kind: bytes
    size: int


def parse_member(header: bytes, *, blob: str = "", offset: int = 0) -> TarMember | None:
    """Read the header block at ``offset`` of a ustar without extensions; None at the end, a block of zeros.

    Raises FormatError for anything else.
    """
    if header == bytes(BLOCK):
        return None
    if not _is_header(header):
        raise FormatError("not a ustar header", blob=blob, offset=offset, got=header[:16].hex() or "nothing")
    size = _number(header[124:136], "size", offset + 124, blob)
    return TarMember(header[:100].partition(b"\0")[0], header[156:157], size)


def wrap_header(size: int) -> bytes:
    """Return the 1536 bytes to put before a content of ``size`` bytes, as the original's tools write them."""
    record = _pax_record(size)
    pax = _with_checksum(_pack(name=b"overlaybd.pax", size=_octal(len(record), 12), kind=_PAX))
    file = _pack(
        name=b"overlaybd.commit",
        mode=b"100644 \0",
        owner=b"     0 \0",
        size=_octal(0, 12),
        mtime=_octal(0, 12),
        kind=b"0",
        owner_name=b"root",
    )
    return pax + record.ljust(BLOCK, b"\0") + _with_checksum(file)


def file_header(name: bytes, size: int) -> bytes:
    """Return the 512 bytes before a read-only file owned by root, with time 0, in the form of the original's
    traces."""
    header = bytearray(
        _pack(name=name, mode=b"0000444", owner=b"0000000", size=b"%011o" % size, mtime=b"%011o" % 0, kind=b"0")
    )
    header[_DEVICE] = b"0000000\0" * 2
    return bytes(header[: _CHECKSUM.start] + b"%06o\0 " % (sum(header) + 8 * 0x20) + header[_CHECKSUM.stop :])


def placeholder_header() -> bytes:
    """Return 1536 bytes that reserve the header's place while the size is unknown; they do not parse as a tar."""
    record = _pax_record(0)
    pax = _pack(name=b"overlaybd.pax", size=_octal(len(record), 12), kind=_PAX, magic=b"xxtar", version=b"xx")
    file = _pack(name=b"overlaybd.new", kind=b"0", magic=b"xxtar", version=b"xx")
    return pax + record.ljust(BLOCK, b"\0") + file


def wrap_tail(size: int) -> bytes:
    """Return the bytes after a content of ``size`` bytes: padding and the two zero blocks that end a tar."""
    return bytes(-size % BLOCK + 2 * BLOCK)


def _is_header(header: bytes) -> bool:
    if len(header) < BLOCK or not header.startswith(b"ustar", 257) or header[263:265] != b"00":
        return False
    # The checksum field counts as blanks in its own sum. Old tars summed signed bytes.
    rest = header[: _CHECKSUM.start] + header[_CHECKSUM.stop :]
    unsigned = sum(rest) + 8 * 0x20
    try:
        stored = _number(header[_CHECKSUM], "checksum", 148, "")
    except FormatError:
        return False
    return stored == unsigned or stored == unsigned - 256 * sum(byte >> 7 for byte in rest)


def _number(field: bytes, what: str, offset: int, blob: str) -> int:
    if field[0] & 0x80:  # base 256, for sizes of 8 GiB and more
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if value < 1 << 63:
            return value
    else:
        digits = field.strip(b" \0")
        if not digits:
            return 0
        if not digits.strip(b"01234567"):
            return int(digits, 8)
    raise FormatError(f"tar {what} is not a number", blob=blob, offset=offset, got=field)


def _pax_size(records: bytes, blob: str) -> int:
    # The last "size" record counts; 0 without one.
    size = 0
    while records:
        digits, blank, rest = records.partition(b" ")
        length = int(digits) if blank and digits.isdigit() and len(digits) <= 3 else 0
        record = rest[: length - len(digits) - 1]
        key, equals, value = record[:-1].partition(b"=")
        if not len(digits) + 1 < length <= len(records) or record[-1:] != b"\n" or not equals:
            raise FormatError("malformed pax record", blob=blob, offset=BLOCK, got=records[:32])
        if key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise FormatError("pax size is not a number", blob=blob, offset=BLOCK, got=value[:32])
            size = int(value)
        records = records[length:]
    return size


def _pax_record(size: int) -> bytes:
    # The length counts its own digits, so one more digit may make it one longer again.
    body = f" size={size}\n"
    length = len(body) + 2
    while length != len(str(length)) + len(body):
        length = len(str(length)) + len(body)
    return f"{length}{body}".encode()


def _octal(value: int, width: int) -> bytes:
    return b"%*o " % (width - 1, value)


def _pack(
    *,
    name: bytes,
    kind: bytes,
    size: bytes = b"",
    mode: bytes = b"",
    owner: bytes = b"",
    mtime: bytes = b"",
    owner_name: bytes = b"",
    magic: bytes = b"ustar",
    version: bytes = b"00",
) -> bytes:
    return _HEADER.pack(name, mode, owner, owner, size, mtime, b"", kind, b"", magic, version, owner_name, owner_name)


def _with_checksum(header: bytes) -> bytes:
    total = sum(header) + 8 * 0x20
    return header[: _CHECKSUM.start] + b"%6o \0" % total + header[_CHECKSUM.stop :]
