"""Changed copies of sound files: small damage, large numbers, pieces moved, and repaired checksums."""

from __future__ import annotations

import random
import re

from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.zfile.layout import MAGIC as ZFILE_MAGIC

_NUMBERS = (0, 1, 4, 5, 255, 256, 511, 512, 4095, 4096, 65535, 65536, 1 << 20, 1_000_000_000, 128_000_000)
_LIMITS = (
    (1 << 15) - 1,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
_TOKENS = (
    b"null", b"true", b"[]", b"{}", b'""', b"-1", b"1e999", b"18446744073709551616", b"[" * 3000, b'{"a":' * 3000,
    b'"\\ud800"', b"\xff\xfe", b"NaN", b"9" * 5000, b"sha256:" + b"0" * 64, b'"lowers"', b'"size"', b"../" * 20,
)  # fmt: skip


def mutate(source: random.Random, seed: bytes, others: list[bytes]) -> bytes:
    """Return ``seed`` with one to six changes; sometimes its ZFile digests are made right again afterwards."""
    data = bytearray(seed)
    for _ in range(source.choice((1, 1, 2, 3, 6))):
        _change(source, data, others)
    if source.random() < 0.7:
        _repair_digests(data)
    return bytes(data)


def _change(source: random.Random, data: bytearray, others: list[bytes]) -> None:
    at = _place(source, len(data))
    match source.randrange(9):
        case 0:
            if at < len(data):
                data[at] ^= 1 << source.randrange(8)
        case 1:
            data[at : at + 1] = source.randbytes(1)
        case 2:
            size = source.choice((2, 4, 8))
            at -= at % size
            value = source.choice(_NUMBERS + _LIMITS) + source.choice((-1, 0, 0, 1))
            data[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        case 3:
            stretch = source.randbytes(source.choice((1, 4, 16, 200)))
            data[at : at + len(stretch)] = stretch
        case 4:
            del data[at : at + source.choice((1, 4, 16, 512, 4096))]
        case 5:
            data[at:at] = source.randbytes(source.choice((1, 4, 512)))
        case 6:
            other = source.choice(others)
            begin = _place(source, len(other))
            piece = other[begin : begin + source.choice((16, 96, 512, 4096))]
            data[at : at + len(piece)] = piece
        case 7:
            del data[at:]
        case 8:
            _change_text(source, data)


def _place(source: random.Random, size: int) -> int:
    # Headers, trailers and what lies before the trailer are where the numbers are.
    kind = source.random()
    if kind < 0.4:
        return min(source.randrange(160), size)
    if kind < 0.7:
        return max(0, size - source.choice((512, 4096, 4096 + 4096, 700)) + source.randrange(160))
    return source.randrange(size + 1)


def _change_text(source: random.Random, data: bytearray) -> None:
    # A value of a JSON document for another.
    values = [
        found.span() for found in re.finditer(rb'"[^"]{0,200}"|\d+|true|false|null|\[|\{', bytes(data[:20_000]))
    ]
    if values:
        begin, end = source.choice(values)
        data[begin:end] = source.choice(_TOKENS)


def _repair_digests(data: bytearray) -> None:
    # Or nearly everything would be refused for its digest.
    start = 1536 if data[1536:1560] == ZFILE_MAGIC else 0
    if data[start : start + 24] != ZFILE_MAGIC or len(data) < start + 512:
        return
    header = data[start : start + 512]
    index_offset = int.from_bytes(header[40:48], "little")
    index_size = int.from_bytes(header[48:56], "little")
    if index_size < 1 << 20:
        begin = start + index_offset
        header[64:68] = raw_crc32c(bytes(data[begin : begin + 4 * index_size])).to_bytes(4, "little")
    header[28:32] = bytes(4)
    header[28:32] = raw_crc32c(bytes(header)).to_bytes(4, "little")
    data[start : start + 512] = header
