"""Reading a gzip layer at any place by the original's index, and never a wrong byte."""

from __future__ import annotations

import gzip
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from obdlab.blob import MemoryBlob, Wrapper
from obdlab.call import Call
from obdlab.errors import CorruptBlobError, FormatError, OutOfRangeError
from obdlab.formats.gzipindex import HEADER_SIZE, WINDOW, IndexHeader, pack, parse_table
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.spancache import SpanCache
from obdlab.localfile import LocalFile
from tests.layers.golden import TURBO

PAIRS = ["l1", "l2", "l3", "good", "other"]
GZ = (TURBO / "good.tar.gz").read_bytes()
INDEX = (TURBO / "good.gzip.meta").read_bytes()
TAR = gzip.decompress(GZ)
HEADER = IndexHeader.from_bytes(INDEX, index_size=len(INDEX))
TABLE = parse_table(INDEX[HEADER.index_start :], HEADER)


class Counting(Wrapper):
    """Counts the bytes that are read, and may damage some until they are evicted."""

    def __init__(self, data: bytes) -> None:
        super().__init__(MemoryBlob(data, "layer.tar.gz"))
        self.count = 0
        self.reads: list[tuple[int, int]] = []
        self.damaged: int | None = None
        self.evicted: list[tuple[int, int]] = []

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        data = bytearray(super().read_at(offset, length))
        self.count += length
        self.reads.append((offset, offset + length))
        if self.damaged is not None and offset <= self.damaged < offset + length:
            data[self.damaged - offset] ^= 0xFF
        return bytes(data)

    def evict(self, offset: int, length: int) -> None:
        self.evicted.append((offset, offset + length))


def target(gz: bytes = GZ, index: bytes = INDEX, spans: SpanCache | None = None) -> GzipTarget:
    return GzipTarget(MemoryBlob(gz, "layer.tar.gz"), MemoryBlob(index, "gzip.meta"), spans=spans)


@pytest.mark.parametrize("name", PAIRS)
def test_what_the_original_indexed_is_read_at_any_place(name: str) -> None:
    tar = gzip.decompress((TURBO / f"{name}.tar.gz").read_bytes())
    blob = GzipTarget(LocalFile(TURBO / f"{name}.tar.gz"), LocalFile(TURBO / f"{name}.gzip.meta"))
    assert blob.size == len(tar)
    chooser = random.Random(name)
    for _ in range(60):
        begin, end = sorted(chooser.sample(range(len(tar) + 1), 2))
        assert blob.read_at(begin, end - begin) == tar[begin:end]
    for _ in range(60):
        begin = chooser.randrange(len(tar) - 4096)
        assert blob.read_at(begin, 4096) == tar[begin : begin + 4096]
    assert sum(blob.verify()) == len(tar)
    blob.close()


def test_reading_in_order_inflates_and_reads_each_byte_once() -> None:
    counting = Counting(GZ)
    blob = GzipTarget(counting, MemoryBlob(INDEX))
    opening = counting.count
    for at in range(0, len(TAR), 4096):
        assert blob.read_at(at, min(4096, len(TAR) - at)) == TAR[at : at + 4096]
    assert blob.statistics() == {"decoded_spans": 4, "decoded_bytes": len(TAR)}
    assert counting.count - opening <= len(GZ) + len(TABLE)  # the byte in which an entry begins twice


def test_a_read_of_a_few_bytes_inflates_one_span_at_most() -> None:
    for at in random.Random(5).sample(range(len(TAR) - 4096), 30):
        counting = Counting(GZ)
        blob = GzipTarget(counting, MemoryBlob(INDEX))
        del counting.reads[:]
        begin, end = blob.piece(at)
        assert begin <= at < end
        length = min(4096, end - at)
        assert blob.read_at(at, length) == TAR[at : at + length]
        assert blob.decoded_spans == 1
        assert blob.decoded_bytes == end - begin
        assert counting.reads == [blob.map_range(at, at + length)]


def test_no_more_is_kept_than_the_limit() -> None:
    spans = SpanCache(3 << 20)
    blobs = [target(spans=spans), target(spans=spans)]
    for blob in blobs:
        assert blob.read_at(0, blob.size) == TAR
        assert spans.size <= 3 << 20
    assert spans.size > 0
    for blob in blobs:
        blob.close()
    assert spans.size == 0


def test_threads_share_what_they_decode() -> None:
    blob = target()
    ranges = [(at, 8192) for at in random.Random(3).sample(range(len(TAR) - 8192), 200)]
    with ThreadPoolExecutor(8) as threads:
        for (at, length), data in zip(ranges, threads.map(lambda each: blob.read_at(*each), ranges), strict=True):
            assert data == TAR[at : at + length]
    assert blob.decoded_spans == 4


def test_ranges_outside() -> None:
    blob = target()
    for offset, length in ((-1, 1), (0, len(TAR) + 1), (len(TAR), 1), (5, -1)):
        with pytest.raises(OutOfRangeError):
            blob.read_at(offset, length)
        with pytest.raises(OutOfRangeError):
            blob.map_range(offset, offset + length)
    with pytest.raises(OutOfRangeError):
        blob.piece(len(TAR))
    assert blob.read_at(len(TAR), 0) == b""


# -- what does not belong together ----------------------------------------------------------------------------------


def pair(gz: str, index: str) -> GzipTarget:
    return GzipTarget(LocalFile(TURBO / f"{gz}.tar.gz"), LocalFile(TURBO / f"{index}.gzip.meta"))


def test_an_index_of_another_layer_of_the_same_size_is_refused() -> None:
    assert (TURBO / "good.tar.gz").stat().st_size == (TURBO / "other.tar.gz").stat().st_size
    for gz, index in (("good", "other"), ("other", "good")):
        with pytest.raises(
            FormatError, match=rf"{index}.gzip.meta is the index of another gzip file: its first entry"
        ):
            pair(gz, index)


def test_an_index_of_a_layer_of_another_size_is_refused() -> None:
    with pytest.raises(FormatError, match=r"index of another gzip file \(got 487422 bytes, wanted 464415\)"):
        pair("good", "twomember")


def test_an_index_of_another_layer_with_the_same_header_never_gives_a_byte() -> None:
    # Nothing tells at open: sizes and gzip header are the same. Every span is checked by the window at its end.
    foreign = (TURBO / "other.gzip.meta").read_bytes()
    header = IndexHeader.from_bytes(foreign, index_size=len(foreign))
    table = parse_table(foreign[header.index_start :], header).copy()
    table["stored"][0] = TABLE["stored"][0]
    packed = pack(table.tobytes())
    head = replace(header, index_size=header.index_start + len(packed)).to_bytes()
    blob = target(index=head + foreign[HEADER_SIZE : header.index_start] + packed)
    for number in range(len(table)):
        with pytest.raises(CorruptBlobError, match=r"layer.tar.gz"):
            blob.read_at(int(table["content"][number]), 1)
    assert blob.decoded_spans == 0


@pytest.mark.parametrize(
    ("entries", "table", "what"),
    [
        (1, 1 << 30, r"the table is longer than its entries at offset 365 \(got 1073741824, wanted at most 93\)"),
        (1, 94, "the table is longer than its entries"),
        (60_000_000, 60_000_000 * 29, r"impossible number of entries \(got 60000000, wanted 1 to 2097152\)"),
    ],
)
def test_too_large_a_table_is_refused_before_it_is_read(tmp_path: Path, entries: int, table: int, what: str) -> None:
    start = HEADER_SIZE + 32 * entries
    header = IndexHeader(1, entries, len(GZ), len(TAR), start + table, start)
    (tmp_path / "index").write_bytes(header.to_bytes())
    os.truncate(tmp_path / "index", header.index_size)
    reads = []

    class Watched(Wrapper):
        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            reads.append((offset, length))
            return super().read_at(offset, length, call)

    with LocalFile(tmp_path / "index") as file, pytest.raises(FormatError, match=what):
        GzipTarget(MemoryBlob(GZ), Watched(file))
    assert reads == [(0, HEADER_SIZE)]


def test_a_second_member_is_not_read_as_zeros() -> None:
    blob = pair("twomember", "twomember")
    assert blob.size == 1642596
    assert blob.read_at(0, 1000) == TAR[:1000]
    with pytest.raises(CorruptBlobError, match="several members, of which the index knows the first alone"):
        blob.read_at(blob.size - 1, 1)
    with pytest.raises(CorruptBlobError, match="several members"):
        list(blob.verify())


@pytest.mark.parametrize("cut", [len(GZ) // 2, len(GZ) - 9, len(GZ) - 1])
def test_a_cut_file_is_refused_even_if_its_index_has_the_size(cut: int) -> None:
    with pytest.raises(FormatError, match="index of another gzip file"):
        target(GZ[:cut])
    head = replace(HEADER, compressed_size=cut).to_bytes()
    try:
        blob = target(GZ[:cut], head + INDEX[HEADER_SIZE:])
    except FormatError:
        return  # an entry lies behind the end
    with pytest.raises(CorruptBlobError, match=r"less than the index says|goes on behind|inside its trailer"):
        blob.read_at(blob.size - 1, 1)


@pytest.mark.parametrize(("at", "what"), [(-1, "another length in its trailer"), (-5, "CRC and length")])
def test_a_damaged_trailer(at: int, what: str) -> None:
    data = bytearray(GZ)
    data[at] ^= 1
    with pytest.raises(CorruptBlobError, match=r"CRC and length|another length"):
        list(target(bytes(data)).verify())
    small = bytearray((TURBO / "l2.tar.gz").read_bytes())
    small[at] ^= 1
    blob = GzipTarget(MemoryBlob(bytes(small)), LocalFile(TURBO / "l2.gzip.meta"))
    with pytest.raises(CorruptBlobError, match="CRC and length"):  # a layer of one span is checked whole
        blob.read_at(0, 10)
    if at == -1:
        with pytest.raises(CorruptBlobError, match=what):
            target(bytes(data)).read_at(len(TAR) - 1, 1)


def test_any_damaged_byte_is_found_by_verify_and_some_by_a_read() -> None:
    found = 0
    chooser = random.Random(11)
    for at in chooser.sample(range(int(TABLE["stored"][0]), len(GZ) - 8), 40):
        data = bytearray(GZ)
        data[at] ^= 1 << chooser.randrange(8)
        blob = target(bytes(data))
        with pytest.raises(CorruptBlobError):
            list(blob.verify())
        try:
            wrong = blob.read_at(0, blob.size) != TAR
            assert wrong
        except CorruptBlobError:
            found += 1
    assert found > 10  # gzip has no checksums of parts


def test_zeros_behind_the_end_are_padding_and_other_bytes_are_not() -> None:
    for size in (1, 511, 300_000):
        padded = GZ + bytes(size)
        head = replace(HEADER, compressed_size=len(padded)).to_bytes()
        blob = target(padded, head + INDEX[HEADER_SIZE:])
        assert blob.read_at(0, blob.size) == TAR
        assert sum(blob.verify()) == len(TAR)
        other = padded[:-1] + b"x"
        blob = target(other, head + INDEX[HEADER_SIZE:])
        with pytest.raises(CorruptBlobError, match=r"several members|goes on behind"):
            blob.read_at(blob.size - 1, 1)


def test_a_damaged_window_makes_both_of_its_spans_unreadable() -> None:
    data = bytearray(INDEX)
    data[int(TABLE["window"][2]) + 50] ^= 8
    blob = target(index=bytes(data))
    first, second, third, last = (int(at) for at in TABLE["content"])
    assert blob.read_at(first, 10) == TAR[:10]
    assert blob.read_at(last, 10) == TAR[last : last + 10]
    for at in (second, third):
        with pytest.raises(CorruptBlobError, match=r"gzip\.meta: window of the gzip index"):
            blob.read_at(at, 10)


@pytest.mark.parametrize("less", [1, 100_000])
def test_more_content_than_the_index_says_is_refused_before_it_takes_memory(less: int) -> None:
    head = replace(HEADER, uncompressed_size=HEADER.uncompressed_size - less).to_bytes()
    blob = target(index=head + INDEX[HEADER_SIZE:])
    with pytest.raises(CorruptBlobError, match="to more than the index says"):
        blob.read_at(blob.size - 1, 1)


def test_an_entry_at_the_end_of_the_file_is_refused_when_it_is_read() -> None:
    # The span before it would end with the member, and not inside it.
    table = np.concatenate([TABLE, TABLE[-1:]])
    packed = pack(TAR[-WINDOW:])
    table[-1] = (len(TAR), len(GZ), HEADER.index_start, 0, len(packed))
    rows = pack(table.tobytes())
    start = HEADER.index_start + len(packed)
    head = replace(HEADER, entries=5, index_start=start, index_size=start + len(rows)).to_bytes()
    blob = target(index=head + INDEX[HEADER_SIZE : HEADER.index_start] + packed + rows)
    with pytest.raises(CorruptBlobError, match="ends before the content that its index knows"):
        blob.read_at(len(TAR) - 1, 1)


def test_reading_in_order_reads_each_window_once() -> None:
    index = Counting(INDEX)
    blob = GzipTarget(MemoryBlob(GZ), index)
    blob.read_at(0, blob.size)
    windows = [(int(row["window"]), int(row["window"]) + int(row["length"])) for row in TABLE]
    assert [each for each in index.reads if each in windows] == windows


# -- caches below ---------------------------------------------------------------------------------------------------


def test_damage_in_a_cache_below_is_evicted_and_read_once_more() -> None:
    class Healing(Counting):
        def evict(self, offset: int, length: int) -> None:
            super().evict(offset, length)
            self.damaged = None

    counting = Healing(GZ)
    blob = GzipTarget(counting, MemoryBlob(INDEX))
    counting.damaged = int(TABLE["stored"][2]) - 1000  # in the window at the end of the span
    at = int(TABLE["content"][1]) + 5
    assert blob.read_at(at, 100) == TAR[at : at + 100]
    assert counting.evicted == [blob.map_range(at, at + 1)]


def test_evicting_drops_what_was_decoded() -> None:
    counting = Counting(GZ)
    blob = GzipTarget(counting, MemoryBlob(INDEX))
    blob.read_at(0, blob.size)
    blob.evict(int(TABLE["content"][1]), 1)
    blob.read_at(0, blob.size)
    assert blob.decoded_spans == 5


def test_the_constructor_leaves_the_blobs_open_if_it_raises(tmp_path: Path) -> None:
    (tmp_path / "index").write_bytes(INDEX[:-1])
    with LocalFile(TURBO / "good.tar.gz") as gz, LocalFile(tmp_path / "index") as index:
        with pytest.raises(FormatError):
            GzipTarget(gz, index)
        assert gz.read_at(0, 2) == b"\x1f\x8b"
        assert index.read_at(0, 2) == b"dd"
