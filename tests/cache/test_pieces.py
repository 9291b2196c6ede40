"""An origin that decodes whole pieces: a miss stores all of the piece, so that no byte is decoded twice."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from obdlab.blob import Blob, MemoryBlob, Wrapper
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.formats.gzipindex import MIN_SPAN
from obdlab.formats.oci import digest_of
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.spancache import SpanCache
from tests.layers.gzip_samples import content, index_of, member

PAGE = 4096
DATA = content(3_000_000, 3)
GZ = member(DATA)
INDEX = index_of(GZ, span=4 * MIN_SPAN)[0]


def opened(directory: Path, *, kept: int = 0, readahead: int = 0, extent: int = 0) -> tuple[Blob, GzipTarget]:
    """The content through a cache, and the target; only ``kept`` bytes of what it decodes stay in memory."""
    target = GzipTarget(MemoryBlob(GZ), MemoryBlob(INDEX), spans=SpanCache(kept))
    cache = BlockCache(directory, unit=PAGE, readahead_max=readahead, extent=extent)
    blob = cache.open(Wrapper(target), digest_of(GZ))
    assert isinstance(blob, CachedBlob)
    blob.opened(10)
    return blob, target


@pytest.mark.parametrize("extent", [0, 256 << 10])
def test_a_small_read_decodes_one_piece_and_keeps_all_of_it(tmp_path: Path, extent: int) -> None:
    pages = range(0, len(DATA) - PAGE, PAGE)
    for at in (*random.Random(1).sample(pages, 12), pages[-1]):
        blob, target = opened(tmp_path / str(at), extent=extent)
        begin, end = target.piece(at)
        inside = begin <= at and at + PAGE <= end
        assert blob.read_at(at, PAGE) == DATA[at : at + PAGE]
        assert target.decoded_spans == (1 if inside else 2)
        first, last = -(-begin // PAGE) * PAGE, end if end == len(DATA) else end // PAGE * PAGE
        assert blob.read_at(first, last - first) == DATA[first:last]
        assert target.decoded_spans == (1 if inside else 2), "all of it was kept"


def test_reading_in_order_decodes_each_byte_once(tmp_path: Path) -> None:
    for readahead in (0, 1 << 20):
        # The last piece in memory has the beginning of a page whose end lies in the next piece.
        blob, target = opened(tmp_path / str(readahead), kept=2 << 20, readahead=readahead)
        for at in range(0, len(DATA), PAGE):
            assert blob.read_at(at, min(PAGE, len(DATA) - at)) == DATA[at : at + PAGE]
        assert target.decoded_bytes == len(DATA)
        blob.close()


def test_a_later_process_decodes_nothing(tmp_path: Path) -> None:
    blob, _ = opened(tmp_path, kept=1 << 20)
    assert blob.read_at(0, len(DATA)) == DATA
    blob.close()
    blob, target = opened(tmp_path)
    assert blob.read_at(0, len(DATA)) == DATA
    assert target.decoded_spans == 0


def test_random_reads_of_threads_decode_each_byte_about_once(tmp_path: Path) -> None:
    blob, target = opened(tmp_path, kept=4 << 20)
    places = random.Random(2).sample(range(len(DATA) - 9000), 300)
    with ThreadPoolExecutor(6) as threads:
        for at, data in zip(places, threads.map(lambda at: blob.read_at(at, 9000), places), strict=True):
            assert data == DATA[at : at + 9000]
    assert target.decoded_bytes == len(DATA)


def test_a_blob_without_pieces_says_so() -> None:
    assert MemoryBlob(b"abc").piece(1) is None
    assert Wrapper(MemoryBlob(b"abc")).piece(1) is None
