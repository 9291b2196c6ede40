"""Targets of either compression below the sums of their tar: how much is decoded, and that nothing wrong is seen."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import zstandard

from obdlab.blob import MemoryBlob, Wrapper
from obdlab.call import Call
from obdlab.errors import CorruptBlobError
from obdlab.formats.tarsums import PIECE_OF_COMPRESSED, TarSums
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.spancache import SpanCache
from obdlab.layers.spannedtarget import SpannedTarget
from obdlab.layers.summedtar import SummedTar
from obdlab.layers.zstdtarget import ZstdTarget
from obdlab.layers.zstdwriter import ZstdIndexWriter
from tests.layers.gzip_samples import content, index_of, member

DATA = content(9_300_000)
PIECE = PIECE_OF_COMPRESSED


def gzip_pair() -> tuple[bytes, bytes]:
    gz = member(DATA)
    return gz, index_of(gz)[0]


def zstd_pair() -> tuple[bytes, bytes]:
    step = 999_000  # no border of a frame is one of a piece
    stored = b"".join(zstandard.ZstdCompressor().compress(DATA[at : at + step]) for at in range(0, len(DATA), step))
    writer = ZstdIndexWriter()
    for _ in writer.decompressed(io.BytesIO(stored)):
        pass
    return stored, writer.to_bytes()


PAIRS: dict[type[SpannedTarget], tuple[bytes, bytes]] = {GzipTarget: gzip_pair(), ZstdTarget: zstd_pair()}


@pytest.fixture(params=PAIRS, ids=["gzip", "zstd"])
def kind(request: pytest.FixtureRequest) -> Callable[..., SpannedTarget]:
    return request.param  # type: ignore[no-any-return]


class Damaged(Wrapper):
    """Flips a bit of one byte until it is evicted."""

    at: int | None = None
    evicted = 0

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        data = bytearray(super().read_at(offset, length, call))
        if self.at is not None and offset <= self.at < offset + length:
            data[self.at - offset] ^= 1
        return bytes(data)

    def evict(self, offset: int, length: int) -> None:
        self.evicted += 1
        self.at = None


def opened(kind: Callable[..., SpannedTarget], kept: int) -> tuple[SpannedTarget, SummedTar, Damaged]:
    stored, index = PAIRS[kind]  # type: ignore[index]
    below, spans = Damaged(MemoryBlob(stored, "layer")), SpanCache(kept)
    target = kind(below, MemoryBlob(index, "index"), spans=spans, checked_above=True)
    sums = TarSums(PIECE)
    for _ in sums.passing([DATA]):
        pass
    return target, SummedTar(target, MemoryBlob(sums.to_bytes(), "sums"), spans), below


def test_a_read_of_a_few_bytes_decodes_one_span_and_no_more_of_the_next_than_its_piece(
    kind: Callable[..., SpannedTarget],
) -> None:
    for at in random.Random(5).sample(range(2 * PIECE, len(DATA) - 4096), 30):
        at = at // 4096 * 4096
        target, tar, _ = opened(kind, 32 << 20)
        with closing(tar):
            assert tar.read_at(at, 4096) == DATA[at : at + 4096]
            begin = at // PIECE * PIECE
            end = min(len(DATA), begin + PIECE)
            first, last = target.piece(begin), target.piece(end - 1)
            assert first
            assert last
            most = end - first[0] if end - last[0] <= (last[1] - last[0]) // 2 else last[1] - first[0]
            assert target.decoded_bytes <= most


def test_reading_in_order_decodes_each_byte_once(kind: Callable[..., SpannedTarget]) -> None:
    target, tar, _ = opened(kind, 8 << 20)
    with closing(tar):
        for at in range(0, len(DATA), 128 << 10):
            length = min(128 << 10, len(DATA) - at)
            assert tar.read_at(at, length) == DATA[at : at + length]
        assert target.decoded_bytes == len(DATA)


def test_two_readers_in_order_at_the_same_time(kind: Callable[..., SpannedTarget]) -> None:
    target, tar, _ = opened(kind, 16 << 20)
    with closing(tar), ThreadPoolExecutor(4) as threads:
        places = [(at, min(128 << 10, len(DATA) - at)) for at in range(0, len(DATA), 128 << 10)]
        for (at, length), data in zip(places, threads.map(lambda each: tar.read_at(*each), places), strict=True):
            assert data == DATA[at : at + length]
        assert target.decoded_bytes < 1.5 * len(DATA)


@pytest.mark.parametrize("number", [2, 5])
def test_a_damaged_beginning_is_read_again_and_never_seen(kind: Callable[..., SpannedTarget], number: int) -> None:
    target, tar, below = opened(kind, 32 << 20)
    with closing(tar):
        place = target.piece(number * PIECE)
        assert place
        begin = target.map_range(place[1], place[1] + 1)[0]  # the stored span behind the piece's first one
        for at in range(begin + 100, begin + 2000, 211):
            tar.evict(0, tar.size)
            target.read_at(0, 10)  # elsewhere, so that the next read is not in order
            below.at, below.evicted = at, 0
            assert tar.read_at(number * PIECE, 4096) == DATA[number * PIECE :][:4096]
            assert below.evicted


def test_what_stays_damaged_is_an_error(kind: Callable[..., SpannedTarget]) -> None:
    class Stubborn(Damaged):
        def evict(self, offset: int, length: int) -> None:
            pass

    stored, index = PAIRS[kind]  # type: ignore[index]
    below, spans = Stubborn(MemoryBlob(stored, "layer")), SpanCache()
    target = kind(below, MemoryBlob(index, "index"), spans=spans, checked_above=True)
    sums = TarSums(PIECE)
    for _ in sums.passing([DATA]):
        pass
    with closing(SummedTar(target, MemoryBlob(sums.to_bytes()), spans)) as tar:
        place = target.piece(5 * PIECE)
        assert place
        below.at = target.map_range(place[1], place[1] + 1)[0] + 300
        wrong = 0
        for at in range(0, tar.size - 4096, 300_000):
            try:
                assert tar.read_at(at, 4096) == DATA[at : at + 4096]
            except CorruptBlobError:
                wrong += 1
        assert wrong


def test_without_a_check_above_nothing_is_returned_unchecked(kind: Callable[..., SpannedTarget]) -> None:
    stored, index = PAIRS[kind]  # type: ignore[index]
    target = kind(MemoryBlob(stored, "layer"), MemoryBlob(index, "index"))
    with closing(target):
        place = target.piece(5 * PIECE)
        assert place
        assert target.read_at(place[1] - 10, 20) == DATA[place[1] - 10 : place[1] + 10]
        after = target.piece(place[1])
        assert after
        assert target.decoded_bytes == after[1] - place[0]
