"""Gzip layers of one giant deflate block, or with one among others."""

from __future__ import annotations

import gzip
import random
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest

from obdlab.blob import MemoryBlob, Wrapper
from obdlab.call import Call
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.formats.gzipindex import HEADER_SIZE, MIN_SPAN, IndexHeader
from obdlab.layers import longspan, spannedtarget
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.inflater import Inflater
from obdlab.layers.spancache import SpanCache
from tests.layers.gzip_samples import content, index_of, member, one_block, target_of

SIZE = 3_000_000
DATA = bytes(byte % 144 for byte in random.Random(1).randbytes(SIZE))
GZ = one_block(DATA)
INDEX = index_of(GZ)[0]
DISTANCE = 256 << 10


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spannedtarget, "MAX_SPAN", 1 << 20)
    monkeypatch.setattr(longspan, "DISTANCE", DISTANCE)


def most(pieces: int) -> int:
    # Each piece may be longer by the content of one step.
    return pieces * (DISTANCE + longspan._STEP)


def test_the_sample_is_one_block() -> None:
    assert gzip.decompress(GZ) == DATA
    assert IndexHeader.from_bytes(INDEX, index_size=len(INDEX)).entries == 1


def test_a_layer_at_its_real_size() -> None:
    data = DATA * 6
    gz = one_block(data)
    blob = target_of(gz, index_of(gz)[0])
    assert len(data) > spannedtarget.MAX_SPAN
    for at in (len(data) - 100, 5, 9_000_000, 8_999_000):
        assert blob.read_at(at, 100) == data[at : at + 100]
    assert blob.read_at(0, len(data)) == data
    assert sum(blob.verify()) == len(data)


@pytest.mark.usefixtures("small")
def test_reading_in_order_inflates_each_byte_once() -> None:
    blob = target_of(GZ, INDEX, SpanCache(1 << 20))
    for at in range(0, SIZE, 10_000):
        assert blob.read_at(at, 10_000) == DATA[at : at + 10_000]
    assert blob.statistics()["decoded_bytes"] == SIZE


@pytest.mark.usefixtures("small")
def test_a_second_pass_begins_at_the_last_copy_before_each_read() -> None:
    blob = target_of(GZ, INDEX, SpanCache(0))
    assert blob.read_at(SIZE - 1, 1) == DATA[-1:]
    assert blob.statistics()["decoded_bytes"] == SIZE
    for at in random.Random(4).sample(range(SIZE - 4096), 30):
        before = blob.statistics()["decoded_bytes"]
        begin, end = blob.piece(at) or (0, 0)
        assert begin <= at < end
        assert end - begin <= most(1)
        assert blob.read_at(at, 4096) == DATA[at : at + 4096]
        assert blob.statistics()["decoded_bytes"] - before <= most(2)


@pytest.mark.usefixtures("small")
def test_pieces_are_known_behind_the_reader_alone() -> None:
    blob = target_of(GZ, INDEX)
    assert blob.piece(0) is None
    blob.read_at(0, 1)
    begin, end = blob.piece(0) or (0, 0)
    assert (begin, end <= most(1)) == (0, True)
    assert blob.piece(end) is None


@pytest.mark.usefixtures("small")
def test_the_number_of_copies_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longspan, "MOST_POINTS", 4)
    blob = target_of(GZ, INDEX)
    assert blob.read_at(0, SIZE) == DATA
    begin, end = blob.piece(0) or (0, 0)
    assert end - begin >= SIZE // 4


@pytest.mark.usefixtures("small")
def test_threads_and_evictions() -> None:
    blob = target_of(GZ, INDEX, SpanCache(1 << 20))
    places = random.Random(7).sample(range(SIZE - 5000), 60)

    def read(at: int) -> bytes:
        if at % 7 == 0:
            blob.evict(at, 100)
        return blob.read_at(at, 5000)

    with ThreadPoolExecutor(6) as threads:
        for at, data in zip(places, threads.map(read, places), strict=True):
            assert data == DATA[at : at + 5000]


# -- among other blocks ----------------------------------------------------------------------------------------------


def joined() -> tuple[bytes, bytes]:
    """Members of usual blocks, of one giant block, and of usual blocks."""
    first, last = content(200_000, 3), content(300_000, 4)
    return first + DATA + last, member(first) + GZ + member(last)


@pytest.mark.usefixtures("small")
def test_a_giant_block_among_members() -> None:
    data, gz = joined()
    index, found = index_of(gz, span=MIN_SPAN, several=True)
    assert found == data
    blob = target_of(gz, index)
    for at in random.Random(1).sample(range(len(data) - 9000), 40):
        assert blob.read_at(at, 9000) == data[at : at + 9000]
    assert blob.read_at(0, len(data)) == data
    assert sum(blob.verify()) == len(data)


@pytest.mark.usefixtures("small")
def test_a_span_at_which_the_index_alone_begins_is_checked_to_its_end_first() -> None:
    data, gz = joined()
    index, _ = index_of(gz, span=MIN_SPAN, several=True)
    wrong = bytearray(gz)
    wrong[-len(member(content(300_000, 4))) - 100] ^= 1  # near the end of the giant block
    blob = target_of(bytes(wrong), index)
    assert blob.read_at(0, 1000) == data[:1000]
    with pytest.raises(CorruptBlobError):
        blob.read_at(300_000, 10)  # in the giant block, before the damage


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("at", [-1, -8, len(GZ) // 2])
def test_damage_is_found_by_verify(at: int) -> None:
    data = bytearray(GZ)
    data[at] ^= 4
    with pytest.raises(CorruptBlobError):
        list(target_of(bytes(data), INDEX).verify())


@pytest.mark.usefixtures("small")
def test_a_wrong_end_is_found_by_reading_it() -> None:
    for change in (b"x", b"\0x", bytes(70_000) + b"x"):
        header = IndexHeader.from_bytes(INDEX, index_size=len(INDEX))
        gz = GZ + change
        index = replace(header, compressed_size=len(gz)).to_bytes() + INDEX[HEADER_SIZE:]
        with pytest.raises(CorruptBlobError):
            target_of(gz, index).read_at(SIZE - 1, 1)


@pytest.mark.usefixtures("small")
def test_a_giant_block_that_is_cut_ends_in_an_error() -> None:
    gz = member(content(1000)) + GZ
    index, data = index_of(gz, several=True)
    cut = 1 << 20
    header = replace(IndexHeader.from_bytes(index, index_size=len(index)), compressed_size=len(gz) - cut)
    blob = target_of(gz[:-cut], header.to_bytes() + index[HEADER_SIZE:])
    with pytest.raises(CorruptBlobError, match="to less than the index says"):
        blob.read_at(len(data) - 1, 1)


@pytest.mark.usefixtures("small")
def test_damage_in_a_cache_below_is_evicted_and_read_once_more() -> None:
    class Healing(Wrapper):
        damaged = False
        evicted = 0

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            data = super().read_at(offset, length, call)
            return b"\xff" * length if self.damaged and offset > 1_000_000 else data

        def evict(self, offset: int, length: int) -> None:
            self.evicted += 1
            self.damaged = False

    below = Healing(MemoryBlob(GZ))
    blob = GzipTarget(below, MemoryBlob(INDEX))
    below.damaged = True
    assert blob.read_at(SIZE - 100, 100) == DATA[-100:]  # the end is where the length tells
    assert below.evicted == 1
    assert blob.read_at(0, SIZE) == DATA  # nor are pieces that were decoded before found again


@pytest.mark.usefixtures("small")
def test_a_read_that_fails_half_way_changes_nothing() -> None:
    """Every step of a piece once."""

    class Failing(Wrapper):
        left = -1

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            self.left -= 1
            if self.left == 0:
                raise SourceError("down", temporary=True)
            return super().read_at(offset, length, call)

    steps = DISTANCE // longspan._STEP + 3
    for step in range(1, steps):
        below = Failing(MemoryBlob(GZ))
        blob = GzipTarget(below, MemoryBlob(INDEX))
        assert blob.read_at(0, 1) == DATA[:1]
        at = (blob.piece(0) or (0, 0))[1]
        below.left = step
        with suppress(SourceError):
            blob.read_at(at, 100)
        below.left = -1
        assert blob.read_at(at, 3 * DISTANCE) == DATA[at : at + 3 * DISTANCE], step
        assert blob.read_at(SIZE - 100, 100) == DATA[-100:]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stays", [False, True])
def test_a_piece_that_changes_below_is_found(stays: bool) -> None:
    class Changing(Wrapper):
        damaged = False

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            data = super().read_at(offset, length, call)
            # A stored block that is empty and the last: the content ends there.
            return b"\x01\0\0\xff\xff".ljust(length, b"\0") if self.damaged else data

        def evict(self, offset: int, length: int) -> None:
            self.damaged = stays and self.damaged

    below = Changing(MemoryBlob(GZ))
    blob = GzipTarget(below, MemoryBlob(INDEX), spans=SpanCache(0))
    assert blob.read_at(SIZE - 1, 1) == DATA[-1:]
    begin, end = blob.piece(SIZE // 2) or (0, 0)
    below.damaged = True
    if stays:
        with pytest.raises(CorruptBlobError):
            blob.read_at(end - 10, 10)
        below.damaged = False
    assert blob.read_at(end - 10, 10) == DATA[end - 10 : end]
    assert blob.read_at(begin, end - begin) == DATA[begin:end]


@pytest.mark.usefixtures("small")
def test_forgetting_does_not_wait_for_a_reader() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Wrapper):
        slow = False

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            if self.slow:
                begun.set()
                assert go_on.wait(60)
            return super().read_at(offset, length, call)

        def evict(self, offset: int, length: int) -> None:
            pass

    below = Slow(MemoryBlob(GZ))
    blob = GzipTarget(below, MemoryBlob(INDEX))
    assert blob.read_at(0, 1) == DATA[:1]
    below.slow = True
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(blob.read_at, SIZE - 10, 10)
        assert begun.wait(60)
        blob.evict(0, SIZE)  # would wait for ever
        go_on.set()
        assert reader.result(60) == DATA[-10:]
    assert blob.read_at(5, 10) == DATA[5:15]


def test_pieces_are_bounded_whatever_an_index_says() -> None:
    content = longspan.MOST_POINTS * (longspan.MOST_DISTANCE + 1)
    with pytest.raises(FormatError, match="too much content between two places"):
        longspan.LongSpan(
            MemoryBlob(GZ),
            (0, len(GZ)),
            0,
            Inflater(b"", content, library=zlib),
            b"",
            last=True,
            trusted=True,
            check=lambda *_: None,
            keep=lambda _, decode, __: decode(),
        )
