"""zstd layers read by the index of their frames: any frames, damage, foreign indexes, frames too long for memory."""

from __future__ import annotations

import io
import os
import struct
import zlib
from contextlib import closing
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import Blob, MemoryBlob, Wrapper
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats.zstdindex import HEADER_SIZE, ZstdIndex, index_bytes
from obdlab.layers import spannedtarget
from obdlab.layers.spancache import SpanCache
from obdlab.layers.zstdtarget import ZstdTarget
from obdlab.layers.zstdwriter import ZstdIndexWriter

NOISE = os.urandom(1 << 20)


def frame(data: bytes, *, checksum: bool = False, size: bool = True, level: int = 1) -> bytes:
    return zstandard.ZstdCompressor(level, write_checksum=checksum, write_content_size=size).compress(data)


def skippable(data: bytes, number: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + number, len(data)) + data


def index_of(stored: bytes) -> tuple[bytes, bytes]:
    """Return index and content."""
    writer = ZstdIndexWriter(blob="layer")
    content = b"".join(writer.decompressed(io.BytesIO(stored)))
    return writer.to_bytes(), content


def target(stored: bytes, index: bytes | None = None, directory: str = "") -> ZstdTarget:
    blob = MemoryBlob(index_of(stored)[0] if index is None else index, "zstd.meta")
    return ZstdTarget(MemoryBlob(stored, "layer"), blob, spans=SpanCache(directory=directory))


PARTS = st.lists(
    st.one_of(
        st.builds(
            lambda begin, length, checksum, size: (NOISE[begin : begin + length], checksum, size),
            st.integers(0, 1000),
            st.sampled_from([0, 1, 512, 70_000, 130_000, 300_000]),
            st.booleans(),
            st.booleans(),
        ),
        st.builds(lambda length: (None, length, False), st.sampled_from([0, 3, 600_000])),
    ),
    max_size=8,
)


@given(PARTS, st.data())
def test_any_frames_read_as_their_content(parts: list[tuple], data: st.DataObject) -> None:
    stored = content = b""
    for part, second, third in parts:
        if part is None:
            stored += skippable(bytes(second))
        else:
            stored += frame(part, checksum=second, size=third)
            content += part
    index, decoded = index_of(stored)
    assert decoded == content
    blob = target(stored, index)
    assert blob.size == len(content)
    assert blob.read_at(0, len(content)) == content
    for _ in range(4 if content else 0):
        begin = data.draw(st.integers(0, len(content) - 1))
        end = data.draw(st.integers(begin, min(len(content), begin + 200_000)))
        blob.evict(begin, end - begin)
        assert blob.read_at(begin, end - begin) == content[begin:end]
        low, high = blob.map_range(begin, end)
        assert 0 <= low <= high <= len(stored)


def test_a_read_decodes_only_its_span() -> None:
    stored = b"".join(frame(NOISE[at : at + 150_000]) for at in range(0, 900_000, 150_000))
    asked: list[tuple[int, int]] = []

    class Seen(Wrapper):
        def read_at(self, offset: int, length: int, call=None) -> bytes:
            asked.append((offset, length))
            return super().read_at(offset, length, call)

    blob = ZstdTarget(Seen(MemoryBlob(stored, "layer")), MemoryBlob(index_of(stored)[0]))
    assert blob.read_at(300_010, 10) == NOISE[300_010:300_020]
    assert sum(length for _, length in asked) == len(frame(NOISE[300_000:450_000]))
    assert blob.statistics()["decoded_bytes"] == 150_000


def test_a_long_frame_is_decoded_once_and_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spannedtarget, "MAX_SPAN", 1 << 20)
    content = b"".join(NOISE[at:] + NOISE[:at] for at in range(0, 8 << 10, 1 << 10))
    stored = frame(content)
    failing: list[bool] = []
    read = 0

    class Failing(Wrapper):
        def read_at(self, offset: int, length: int, call=None) -> bytes:
            nonlocal read
            if failing:
                raise SourceError("down", temporary=True)
            read += length
            return super().read_at(offset, length, call)

    index = MemoryBlob(index_of(stored)[0])
    blob = ZstdTarget(Failing(MemoryBlob(stored, "layer")), index, spans=SpanCache(directory=str(tmp_path)))
    assert blob.read_at(5, 10) == content[5:15]
    assert read < len(stored) / 2  # the rest is decoded when it is needed
    failing.append(True)
    with pytest.raises(SourceError, match="down"):
        blob.read_at(len(content) - 10, 10)
    failing.clear()
    assert blob.read_at(len(content) - 10, 10) == content[-10:]
    assert blob.piece(len(content) - 1) == (len(content) - (1 << 20), len(content))
    read = 0
    for at in (0, 3_000_001, len(content) - 77):
        assert blob.read_at(at, 77) == content[at : at + 77]
    assert read == 0
    assert os.listdir(tmp_path) == []  # the file has no name
    blob.evict(0, 1)
    assert blob.read_at(0, len(content)) == content
    assert read >= len(stored)
    blob.close()


def test_a_long_frame_leaves_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spannedtarget, "MAX_SPAN", 1 << 10)
    stored = frame(NOISE[:100_000])
    index = MemoryBlob(index_of(stored)[0])
    with ZstdTarget(MemoryBlob(stored, "layer"), index, spans=SpanCache(directory=str(tmp_path))) as blob:
        found = os.statvfs(tmp_path)
        full = os.statvfs_result((*found[:4], found.f_blocks // 16, *found[5:10]))
        monkeypatch.setattr("obdlab.layers.zstdtarget.os.fstatvfs", lambda _: full)
        monkeypatch.setattr("obdlab.layers.zstdtarget._LEAST_FREE", 1 << 60)
        with pytest.raises(SourceError, match=r"cannot keep the decoded content.*would be left on its disk"):
            blob.read_at(50_000, 10)
        monkeypatch.undo()
        monkeypatch.setattr(spannedtarget, "MAX_SPAN", 1 << 10)
        assert blob.read_at(50_000, 10) == NOISE[50_000:50_010]


def test_no_space_for_a_long_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spannedtarget, "MAX_SPAN", 1 << 10)
    stored = frame(NOISE[:100_000])
    with pytest.raises(SourceError, match=r"cannot keep the decoded content .*No such file"):
        target(stored, directory=str(tmp_path / "missing")).read_at(0, 1)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: len(data) - 1)
    with closing(target(stored, directory=str(tmp_path))) as blob, pytest.raises(SourceError, match="No space left"):
        blob.read_at(0, 1)


@pytest.mark.parametrize("most", [16 << 20, 1 << 10])
def test_damage_is_no_content(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(spannedtarget, "MAX_SPAN", most)
    stored = frame(NOISE[:5000] * 40, checksum=True)
    index = index_of(stored)[0]
    for at in range(0, len(stored), 97):
        damaged = bytearray(stored)
        damaged[at] ^= 4
        with closing(target(bytes(damaged), index)) as blob, pytest.raises(CorruptBlobError, match="layer"):
            blob.read_at(0, 200_000)
        with pytest.raises(FormatError):
            index_of(bytes(damaged))
    for length in (1, 10, len(stored) - 1):
        with pytest.raises(FormatError, match=r"layer|zstd"):
            index_of(stored[:length])


def test_damage_in_the_cache_is_read_again() -> None:
    stored = frame(NOISE[:5000], checksum=True)

    class Once(Wrapper):
        evicted = False

        def read_at(self, offset: int, length: int, call=None) -> bytes:
            data = super().read_at(offset, length, call)
            return data if self.evicted else bytes(len(data))

        def evict(self, offset: int, length: int) -> None:
            self.evicted = True

    blob = ZstdTarget(Once(MemoryBlob(stored, "layer")), MemoryBlob(index_of(stored)[0]))
    assert blob.read_at(0, 5000) == NOISE[:5000]


def test_an_index_of_another_file() -> None:
    one, two = frame(NOISE[:1000]) + frame(NOISE[:99_000]), frame(NOISE[:100_000])
    with pytest.raises(FormatError, match="index of another zstd file"):
        target(one, index_of(two)[0])
    sizes = len(one), 90_000
    for wrong in (
        index_bytes(*sizes, [(0, 0, len(one))]),  # less content than there is
        index_bytes(len(one), 200_000, [(0, 0, len(one))]),
        index_bytes(len(one), 100_000, [(0, 4, len(one) - 4)]),
    ):
        with pytest.raises(CorruptBlobError):
            target(one, wrong).read_at(0, 90_000)


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [(1, 0, 5)],
        [(0, 0, 5), (0, 5, 5)],
        [(0, 0, 5), (100, 5, 5)],
        [(0, 0, 0)],
        [(0, 0, 11)],
        [(0, 5, 6)],
        [(0, 0, 5), (50, 4, 5)],
        [(0, 0, 1 << 63), (50, 1 << 63, 5)],
        [(0, (1 << 64) - 1, 2)],
    ],
)
def test_impossible_spans(spans: list[tuple[int, int, int]]) -> None:
    with pytest.raises(FormatError, match="out of order or outside"):
        ZstdIndex.from_bytes(index_bytes(10, 100, spans))


def test_an_index_with_flipped_bits() -> None:
    index = index_of(frame(NOISE[:200_000]) + frame(NOISE[:7]))[0]
    for bit in range((HEADER_SIZE - 4) * 8):  # the header's last word is not used
        damaged = bytearray(index)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FormatError, CorruptBlobError)):
            ZstdIndex.from_bytes(bytes(damaged))
    for length in (0, 7, HEADER_SIZE, len(index) - 1):
        with pytest.raises(FormatError):
            ZstdIndex.from_bytes(index[:length])


def test_what_is_not_decoded_at_all() -> None:
    good = frame(b"content" * 100)
    dictionary = bytearray(good)
    dictionary[4] |= 1
    with pytest.raises(FormatError, match="dictionary"):
        index_of(bytes(dictionary))
    with pytest.raises(FormatError, match="layer: not a zstd frame"):
        index_of(good + b"rest")
    header = b"\x28\xb5\x2f\xfd\x00\x58"
    with pytest.raises(FormatError, match="malformed zstd block"):
        index_of(header + ((1 << 20) << 3 | 1).to_bytes(3, "little"))


def test_a_bomb_takes_no_memory() -> None:
    # Each block of 4 bytes is 128 KiB of content.
    header = b"\x28\xb5\x2f\xfd\x00\x58"
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    last = ((128 << 10) << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x"
    writer = ZstdIndexWriter(blob="layer")
    size = largest = 0
    for piece in writer.decompressed(io.BytesIO(header + block * 999 + last)):
        size += len(piece)
        largest = max(largest, len(piece))
    assert size == 1000 * (128 << 10)
    assert largest <= 1 << 20


def test_the_header_is_what_the_page_says() -> None:
    index = index_of(skippable(b"abc") + frame(b"x" * 600))[0]
    magic, version, count, compressed, content, crc, zero = struct.unpack_from("<8sIIQQII", index)
    stored = len(frame(b"x" * 600))
    assert (magic, version, count, compressed, content, zero) == (b"OBDZSTIX", 1, 1, stored + 11, 600, 0)
    assert struct.unpack_from("<QQQ", index, 40) == (0, 11, stored)
    assert crc == zlib.crc32(index[:32] + index[40:])


def test_it_is_a_blob(tmp_path: Path) -> None:
    blob: Blob = target(frame(NOISE))
    assert blob.piece(0) == (0, len(NOISE))
    assert blob.map_range(5, 5) == (0, 0)
    blob.close()
    blob.close()


def test_skippable_frames_are_in_no_span() -> None:
    one, two = frame(b"a" * 100), frame(b"b" * 100)
    index = ZstdIndex.from_bytes(index_of(one + skippable(b"toc") + two + skippable(b"end"))[0])
    assert index.spans.tolist() == [(0, 0, len(one)), (100, len(one) + 11, len(two))]
