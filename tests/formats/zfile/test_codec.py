"""Block codecs: exact lengths, original bytes, no trust in what compressed bytes claim."""

from __future__ import annotations

import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.zfile.codec import Codec, Lz4, Zstd, codec_for

codecs = pytest.mark.parametrize("codec", [Lz4(), Zstd()], ids=["lz4", "zstd"])
blocks = st.one_of(
    st.binary(min_size=1, max_size=4096),
    st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=16), st.integers(1, 4096)),
)


@codecs
@settings(deadline=None)
@given(block=blocks)
def test_round_trip(codec: Codec, block: bytes) -> None:
    data = bytes(codec.compress(block))
    assert codec.decompress(data, len(block)) == block
    assert codec.decompress(memoryview(data), len(block)) == block
    out = bytearray(len(block) + 2)
    codec.decompress_into(data, memoryview(out)[1:-1])
    assert out == b"\0" + block + b"\0"


@codecs
@settings(deadline=None)
@given(block=blocks, change=st.integers(-40, 40).filter(bool))
def test_any_other_length_is_refused(codec: Codec, block: bytes, change: int) -> None:
    length = max(len(block) + change, 0)
    data = codec.compress(block)
    with pytest.raises(CorruptBlobError):
        codec.decompress(data, length)
    with pytest.raises(CorruptBlobError):
        codec.decompress_into(data, memoryview(bytearray(length)))


@codecs
@settings(deadline=None)
@given(data=st.binary(max_size=200), length=st.integers(1, 300))
def test_rubbish_is_refused_or_gives_the_length(codec: Codec, data: bytes, length: int) -> None:
    try:
        assert len(codec.decompress(data, length)) == length
    except CorruptBlobError:
        pass


@codecs
@settings(deadline=None)
@given(content=st.lists(st.binary(min_size=300, max_size=300), min_size=1, max_size=9))
def test_many_blocks_together(codec: Codec, content: list[bytes]) -> None:
    stored = [memoryview(bytes(codec.compress(block))) for block in content]
    out = bytearray(300 * len(content))
    codec.decompress_all(stored, memoryview(out))
    assert out == b"".join(content)


@codecs
@pytest.mark.parametrize("length", [0, 299, 301])
def test_one_block_of_another_length_among_many(codec: Codec, length: int) -> None:
    stored = [memoryview(bytes(codec.compress(bytes([number]) * 300))) for number in range(5)]
    stored[3] = memoryview(bytes(codec.compress(b"x" * length)) if length else b"rubbish")
    with pytest.raises(CorruptBlobError):
        codec.decompress_all(stored, memoryview(bytearray(1500)))


@codecs
def test_input_with_something_after_it_is_refused(codec: Codec) -> None:
    data = bytes(codec.compress(b"a" * 5000)) + b"more"
    with pytest.raises(CorruptBlobError):
        codec.decompress(data, 5000)


@codecs
def test_a_bomb_is_not_unpacked(codec: Codec) -> None:
    size = 64 << 20
    if isinstance(codec, Zstd):
        small = zstandard.ZstdCompressor().compress(bytes(size))
    else:
        small = bytes(Lz4().compress(bytes(size)))
    tracemalloc.start()
    with pytest.raises(CorruptBlobError):
        codec.decompress(small, 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_frame_that_does_not_claim_its_size() -> None:
    block = b"abc" * 1000
    data = zstandard.ZstdCompressor(write_content_size=False).compress(block)
    assert Zstd().decompress(data, 3000) == block
    for length in (2999, 3001):
        with pytest.raises(CorruptBlobError):
            Zstd().decompress(data, length)


def test_codecs_by_name_and_number() -> None:
    assert isinstance(codec_for("lz4"), Lz4)
    assert isinstance(codec_for(1), Lz4)
    assert isinstance(codec_for("zstd"), Zstd)
    assert isinstance(codec_for(2), Zstd)
    for other in (0, 3, "gzip", ""):
        with pytest.raises(FormatError, match="unknown ZFile compression"):
            codec_for(other)


@codecs
@settings(deadline=None)
@given(
    repeats=st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.integers(1, 60)), max_size=12),
    block_size=st.sampled_from([512, 4096, 65536]),
)
def test_many_blocks_are_stored_as_each_alone(
    codec: Codec, repeats: list[tuple[bytes, int]], block_size: int
) -> None:
    data = b"".join(part * count for part, count in repeats)
    alone = [bytes(codec.compress(data[begin : begin + block_size])) for begin in range(0, len(data), block_size)]
    assert codec.store(memoryview(data), block_size, crcs=False) == (b"".join(alone), [len(block) for block in alone])
    checked = [block + raw_crc32c(block, 100007).to_bytes(4, "little") for block in alone]
    assert codec.store(memoryview(data), block_size, crcs=True) == (
        b"".join(checked),
        [len(block) for block in checked],
    )
