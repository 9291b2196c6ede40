"""Images whose tables are large and whose blobs are not: memory stays within what the docs say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from obdlab.blob import MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.call import Call
from obdlab.errors import FormatError
from obdlab.formats.lsmt.layout import MAX_SEALED_RECORDS, Flags, Header, Segments, Trailer, encode_segments
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import ImageOpenError, open_image, open_stack
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers.append import AppendUpper
from obdlab.layers.budget import BLOCK, MOST_SEGMENTS, TABLES, Budget, TablesTooLargeError
from obdlab.layers.lsmt import open_layer
from obdlab.layers.stack import Stack
from obdlab.settings.settings import Settings
from tests.layers.lsmt_samples import layer
from tests.layers.zfile_samples import compress
from tests.registry.faulty import FaultyRegistry, faulty_registry

MiB = 1 << 20
UUIDS = "00000000-0000-0000-0000-{:012x}"


def many_segments(number: int = 0, count: int = MAX_SEALED_RECORDS) -> bytes:
    """A layer of zeros in so many pieces, some 0.9 MiB as a ZFile."""
    offsets = np.arange(count, dtype=np.int64) * 2 + number % 2
    segments = Segments(
        offset_sectors=offsets,
        length_sectors=np.ones(count, np.int64),
        moffset_sectors=np.full(count, 8, np.int64),
        zeroed=np.ones(count, np.bool_),
        tag=np.zeros(count, np.uint8),
    )
    size = count * 1024
    uuid = UUIDS.format(number)
    header = Header(flags=Flags.HEADER | Flags.DATA | Flags.SEALED, virtual_size=size, uuid=uuid)
    trailer = Trailer(
        flags=Flags.DATA | Flags.SEALED, virtual_size=size, index_offset=4096, index_size=count, uuid=uuid
    )
    return header.to_bytes() + encode_segments(segments) + trailer.to_bytes()


# Opens an image in a process of its own, and tells how much memory that took at most, and what came of it.
_OPEN = """
import json, resource, sys
from pathlib import Path
from obdlab.errors import ObdlabError
from obdlab.image.config import ImageConfig
from obdlab.image.open import open_image
from obdlab.settings.settings import Settings
import obdlab.image.remote
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before, error = peak(), ""
try:
    with open_image(ImageConfig.load(sys.argv[1]), Settings(cache_dir=Path(sys.argv[2]))) as image:
        image.read_at(0, 1 << 20)
except ObdlabError as failed:
    error = str(failed)
print(json.dumps([peak() - before, error]))
"""


def opened(tmp_path: Path, config: ImageConfig) -> tuple[int, str]:
    config.save(tmp_path / "config.v1.json")
    command = [sys.executable, "-c", _OPEN, str(tmp_path / "config.v1.json"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    peak, error = json.loads(done.stdout)
    return peak, error


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with faulty_registry() as registry:
        yield registry


def test_one_blob_listed_255_times(registry: FaultyRegistry, tmp_path: Path) -> None:
    blob = compress(many_segments(), algorithm="zstd", block_size=65536)
    assert len(blob) < MiB
    lower = LowerConfig(digest=registry.add_blob(blob), size=len(blob))
    once, error = opened(tmp_path, ImageConfig(registry.repository().blobs_url, (lower,)))
    assert not error
    often, error = opened(tmp_path, ImageConfig(registry.repository().blobs_url, (lower,) * 255))
    assert not error
    assert often < once + 64 * MiB


def test_many_blobs_with_as_many_segments_as_can_be(registry: FaultyRegistry, tmp_path: Path) -> None:
    lowers = []
    for number in range(12):
        blob = compress(many_segments(number), algorithm="zstd", block_size=65536)
        lowers.append(LowerConfig(digest=registry.add_blob(blob), size=len(blob)))
    url = registry.repository().blobs_url
    for config in (ImageConfig(url, tuple(lowers)), ImageConfig(url, tuple(lowers[:4]))):
        peak, error = opened(tmp_path, config)
        assert ("tables of an image's layers take too much memory" in error) == (len(config.lowers) == 12)
        assert peak < 4 * TABLES


def test_a_repeated_layer_shows_where_its_topmost_one_is(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        with AppendUpper.create(tmp_path / "data", tmp_path / "index", MiB) as upper:
            for at in range(number, 200, number + 1):
                upper.write_at(at * 4096, bytes([number + 1]) * 4096)
            write_layer(upper, tmp_path / f"layer{number}", Packing())
        (tmp_path / "data").unlink()
        (tmp_path / "index").unlink()
        paths.append(tmp_path / f"layer{number}")
    for order in ([0, 0], [0, 1, 0], [1, 0, 1, 2, 1], [2, 1, 0, 2, 2, 0, 1, 1]):
        (tmp_path / "copies").mkdir(exist_ok=True)
        copies = []
        for place, number in enumerate(order):  # files of their own, which nobody takes for the same
            copies.append(tmp_path / "copies" / f"{'-'.join(map(str, order))}-{place}")
            copies[-1].write_bytes(paths[number].read_bytes())
        lowers = tuple(LowerConfig(file=str(paths[number])) for number in order)
        with (
            open_stack([str(path) for path in copies]) as wanted,
            open_image(ImageConfig(lowers=lowers), Settings(cache_dir=tmp_path / "cache")) as image,
        ):
            assert image.size == wanted.size
            assert image.read_at(0, MiB) == wanted.read_at(0, MiB)
            assert len(image.layers) == len(image.identity) == len(order)  # type: ignore[union-attr]
            image.evict(0, MiB)


def test_the_budget_of_an_image_is_shared_by_its_layers() -> None:
    budget = Budget(3 * 64 * 100)
    blobs = [many_segments(number, 100) for number in range(4)]
    for blob in blobs[:3]:
        open_layer(MemoryBlob(blob), budget=budget)
    with pytest.raises(FormatError, match="too much memory"):
        open_layer(MemoryBlob(blobs[3]), budget=budget)


@pytest.mark.parametrize("zfile", [False, True])
def test_a_blob_over_the_budget_stays_in_the_cache(zfile: bool) -> None:
    evicted: list[tuple[int, int]] = []

    class Cached(MemoryBlob):
        def evict(self, offset: int, length: int) -> None:
            evicted.append((offset, length))

    layer = many_segments(0, 1000)
    blob = Cached(compress(layer, block_size=4096) if zfile else layer)
    with pytest.raises(TablesTooLargeError, match="too much memory"):
        open_layer(blob, budget=Budget(8))
    assert not evicted


def test_a_layer_of_another_kind_stays_in_the_cache_if_it_is_verified(
    registry: FaultyRegistry, tmp_path: Path
) -> None:
    data = random.Random(3).randbytes(MiB)
    digest, repository = registry.add_blob(data), registry.repository()
    cache = BlockCache(tmp_path / "cache", registry=repository.cache_name, unit=16 << 10)
    config = ImageConfig(repository.blobs_url, (LowerConfig(digest=digest, size=len(data)),))
    with cache.open(MemoryBlob(data, "another image's"), digest) as blob:
        assert isinstance(blob, CachedBlob)
        assert blob.read_at(0, MiB) == data
        assert blob.verify()
        with pytest.raises(ImageOpenError, match="neither a ZFile nor an LSMT layer"):
            open_image(config, Settings(cache_dir=tmp_path / "cache"))
        assert blob.verified
        assert blob.missing_bytes() == 0
    assert not registry.blob_requests()


def test_a_layer_that_is_opened_again_takes_its_share_once() -> None:
    class Fails(MemoryBlob):
        evicted = 0

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            data = super().read_at(offset, length, call)
            # The index overlaps, as long as nobody asks for it anew.
            return data if self.evicted or offset + length <= 4096 else data[16:32] + data[16:]

        def evict(self, offset: int, length: int) -> None:
            self.evicted += 1

    blob = Fails(many_segments(0, 1000))
    open_layer(blob, budget=Budget(64 * 1000))
    assert blob.evicted


def test_block_tables_take_of_it_before_they_are_read() -> None:
    reads: list[int] = []

    class Watched(MemoryBlob):
        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            reads.append(length)
            return super().read_at(offset, length, call)

    blob = compress(many_segments(0, 10_000), block_size=4096)
    blocks = -(-(8192 + 160_000) // 4096)
    open_layer(MemoryBlob(blob), budget=Budget(blocks * BLOCK + 10_000 * 64))
    with pytest.raises(FormatError, match="too much memory"):
        open_layer(Watched(blob), budget=Budget(blocks * BLOCK - 1))
    assert 4 * blocks not in reads


def test_a_stack_of_too_many_segments_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obdlab.layers.stack.MOST_SEGMENTS", 5)
    layers = [layer([(at, 1, False) for at in range(0, 6, 2)], 8192) for _ in range(2)]
    with pytest.raises(FormatError, match="too many segments"):
        Stack(layers)
    assert MOST_SEGMENTS >= 4 * MAX_SEALED_RECORDS


def test_too_large_an_image_is_refused_with_the_layer_that_is_too_much(tmp_path: Path) -> None:
    lowers = []
    for number in range(5):
        path = tmp_path / f"layer{number}"
        path.write_bytes(many_segments(number))
        lowers.append(LowerConfig(file=str(path)))
    with pytest.raises(ImageOpenError, match=r"cannot open lower 4 of 5 .*too much memory"):
        open_image(ImageConfig(lowers=tuple(lowers)), Settings(cache_dir=tmp_path / "cache"))
