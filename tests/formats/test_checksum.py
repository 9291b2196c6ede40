"""The raw CRC-32C, against published and computed vectors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.formats.checksum import raw_crc32c


def bitwise(data: bytes, state: int) -> int:
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state


@pytest.mark.parametrize(
    ("data", "seed", "wanted"),
    [
        (b"123456789", 0, 0x58E3FA20),
        (b"123456789", 100007, 0x3C9BD4E0),
        (bytes(512), 0, 0),
        (b"", 100007, 100007),
        # What the standard CRC-32C of "123456789" is, inverted at both ends.
        (b"123456789", 0xFFFFFFFF, 0xE3069283 ^ 0xFFFFFFFF),
    ],
)
def test_vectors(data: bytes, seed: int, wanted: int) -> None:
    assert raw_crc32c(data, seed) == wanted


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 0xFFFFFFFF))
def test_equals_the_bitwise_definition(data: bytes, seed: int) -> None:
    assert raw_crc32c(data, seed) == bitwise(data, seed)
    assert raw_crc32c(memoryview(data), seed) == bitwise(data, seed)


@settings(deadline=None)
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_crc_continues_where_another_ended(first: bytes, second: bytes) -> None:
    assert raw_crc32c(second, raw_crc32c(first)) == raw_crc32c(first + second)
