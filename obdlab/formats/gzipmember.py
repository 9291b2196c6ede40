"""Header and trailer of a gzip member (RFC 1952), and how a deflate stream (RFC 1951) can begin inside a byte."""

from __future__ import annotations

import struct

from obdlab.errors import FormatError

MAGIC = b"\x1f\x8b"
TRAILER_SIZE = 8
#: Most bytes of a header that are looked at. File name and comment may have any length; no known writer needs 1 KiB.
MAX_HEADER = 64 << 10

_DEFLATE = 8
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT = 2, 4, 8, 16
_RESERVED = 0xE0
_FIXED_SIZE = 10
_TRAILER = struct.Struct("<II")


def header_length(data: bytes, *, blob: str = "", offset: int = 0) -> int:
    """Return the length of the member's header that ``data``, found at ``offset``, begins with.

    ``data`` has all of the header, or its first MAX_HEADER bytes. Raises FormatError if it is no gzip header, or not
    complete.
    """
    if len(data) < _FIXED_SIZE or not data.startswith(MAGIC) or data[2] != _DEFLATE or data[3] & _RESERVED:
        got = data[:4].hex() or "nothing"
        raise FormatError("not a gzip header", blob=blob, offset=offset, got=got, wanted="1f8b08 and known flags")
    flags = data[3]
    at = _FIXED_SIZE
    if flags & _FEXTRA:
        at += 2 + int.from_bytes(data[at : at + 2], "little")
    for text in (_FNAME, _FCOMMENT):
        if flags & text:
            at = data.find(b"\0", at) + 1 or len(data) + 1
    if flags & _FHCRC:
        at += 2
    if at > len(data):
        raise FormatError("gzip header is cut short, or too long", blob=blob, offset=offset, got=f"{len(data)} bytes")
    return at


def parse_trailer(data: bytes) -> tuple[int, int]:
    """Return CRC-32 and length modulo 2**32 of the member's content, from the trailer's 8 bytes."""
    crc, length = _TRAILER.unpack(data)
    return crc, length


def begin_inside_byte(byte: int, bits: int) -> bytes:
    """Return bytes that take the place of ``byte``, of which a deflate stream uses only the upper ``bits`` bits.

    An inflater that can only begin at a whole byte is given these first. They are empty blocks, whose lengths in bits
    fill up the part of the byte that belongs to the block before. ``bits`` is 0 to 7; 0 needs no byte.
    """
    if not bits:
        return b""
    filler, length = _FILLERS[8 - bits]
    return (filler | byte >> 8 - bits << length).to_bytes((length + bits) // 8, "little")


# Returns empty blocks as (bits, number of bits), so many that the number is `rest` modulo 8.
def _filler(rest: int) -> tuple[int, int]:
    # A block of the fixed codes: not the last one, type 1, then code 256 (seven zeros).
    fixed, fixed_length = 0b0000000_01_0, 10
    value = length = 0
    if rest % 2:
        value, length = _odd_block()
    while length % 8 != rest:
        value |= fixed << length
        length += fixed_length
    return value, length


# Returns a block of dynamic codes without content, 95 bits.
def _odd_block() -> tuple[int, int]:
    fields = [
        (0, 1), (2, 2),  # not the last one, type 2
        (0, 5), (0, 5), (15, 4),  # 257 literal codes, 1 distance code, 19 lengths of the code of lengths:
    ]  # fmt: skip
    # 18 (a run of zeros) has length 1 and so the code 0; 0 and 1 have length 2, so 1 has the code 11. The order of
    # the lengths is 16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15.
    fields += [(0, 3), (0, 3), (1, 3), (2, 3)] + [(0, 3)] * 13 + [(2, 3), (0, 3)]
    fields += [(0, 1), (138 - 11, 7), (0, 1), (118 - 11, 7)]  # 256 codes of length 0
    fields += [(3, 2), (3, 2), (0, 1)]  # code 256 and the distance code have length 1; then code 256
    value = length = 0
    for bits, count in fields:
        value |= bits << length
        length += count
    return value, length


_FILLERS = {rest: _filler(rest) for rest in range(1, 8)}
