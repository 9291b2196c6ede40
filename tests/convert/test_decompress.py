from __future__ import annotations

import gzip
import io
import random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.convert.decompress import decompressed
from obdlab.errors import FormatError
from tests.convert.layouts import compress

DATA = random.Random(3).randbytes(300_000) + bytes(3_000_000) + b"text " * 100_000


class Dribble(io.BytesIO):
    """A file that gives few bytes at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size, 777) if size and size > 0 else size)


@pytest.mark.parametrize("how", ["gzip", "zstd", "plain"])
@pytest.mark.parametrize("data", [b"", b"a", b"abc", DATA])
def test_all_kinds(how: str, data: bytes) -> None:
    for file in (io.BytesIO(compress(data, how)), Dribble(compress(data, how))):
        pieces = list(decompressed(file, "blob"))
        assert b"".join(pieces) == data
        assert all(len(piece) <= 4 << 20 for piece in pieces)


def test_gzip_members_and_padding() -> None:
    blob = gzip.compress(b"one") + gzip.compress(b"") + bytes(700) + gzip.compress(b"two") + bytes(1000)
    assert b"".join(decompressed(io.BytesIO(blob), "blob")) == b"onetwo"


def test_zstd_frames_and_skippable_ones() -> None:
    frame = zstandard.ZstdCompressor().compress
    skippable = b"\x5a\x2a\x4d\x18\x03\x00\x00\x00abc"
    blob = skippable + frame(b"one") + skippable + frame(b"two")
    assert b"".join(decompressed(io.BytesIO(blob), "blob")) == b"onetwo"


@pytest.mark.parametrize("length", [3, 10, 100_000, 300_500])
def test_truncated_gzip(length: int) -> None:
    with pytest.raises(FormatError, match="gzip data ends early") as caught:
        list(decompressed(io.BytesIO(gzip.compress(DATA)[:length]), "blob"))
    assert caught.value.offset == length


def test_rubbish_after_gzip() -> None:
    for rubbish in (b"r", b"rubbish", b"rubbish" * 1000):
        with pytest.raises(FormatError, match="gzip data"):
            list(decompressed(io.BytesIO(gzip.compress(b"one") + rubbish), "blob"))


SMALL = random.Random(4).randbytes(200) + bytes(5000)
BLOBS = {how: compress(SMALL, how) for how in ("gzip", "zstd")}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["gzip", "zstd"]), st.integers(4, 5000), st.integers(1, 255))
def test_flipped_bits_give_data_or_a_format_error(how: str, at: int, value: int) -> None:
    blob = bytearray(BLOBS[how])
    blob[at % len(blob)] ^= value
    try:
        list(decompressed(io.BytesIO(bytes(blob)), "blob"))
    except FormatError as error:
        assert error.blob == "blob"
