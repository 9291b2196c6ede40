"""Hot layers: the same disk, fetched by one request."""

from __future__ import annotations

import io
import random
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.errors import FormatError
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import Image, ImageOpenError, open_image, open_stack
from obdlab.image.remote import RemoteLayers
from obdlab.layerfiles.writing import Packing
from obdlab.layers.ends import BEGINNING
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.recorder import Recorder, reads_of
from obdlab.layers.stack import Stack
from obdlab.settings.settings import Settings
from obdlab.traces.hotlayer import (
    NothingHotError,
    begins_hot,
    is_hot,
    stream_if_begins_hot,
    trace_of_hot_layer,
    write_hot_layer,
)
from obdlab.traces.sectors import sectors_of_reads
from obdlab.traces.sets import difference
from tests.layers.golden import GOLDEN, manifest, sha256_of
from tests.registry.faulty import FaultyRegistry, faulty_registry

EXT4 = [GOLDEN / "ext4" / "layer1.obd", GOLDEN / "ext4" / "layer2.obd"]
EXT4_SHA256 = manifest("ext4")["merged"]["layers1-2"]["raw_sha256"]


def _some_reads() -> list[tuple[int, int]]:
    # Half of what the disk holds, here and there, and some of it twice.
    rng = random.Random(5)
    with open_stack(EXT4) as disk:
        reads = [
            (at * 512, min(512 * (end - at), 70_000))
            for begin, end in zip(*disk_ranges(disk), strict=True)
            for at in range(begin, end, 137)
            if rng.random() < 0.5
        ]
    rng.shuffle(reads)
    return [*reads, *reads[:20]]


def disk_ranges(disk: Stack) -> tuple[list[int], list[int]]:
    segments = disk.index.segments()
    return segments.offset_sectors.tolist(), segments.end_sectors.tolist()


READS = _some_reads()


def trace_of(paths: list[Path], reads: list[tuple[int, int]]) -> bytes:
    recorder = Recorder()
    with open_stack(paths) as disk:
        disk.watch(recorder.around)
        for offset, length in reads:
            disk.read_at(offset, length)
        disk.watch(None)
    return Trace.from_reads(reads_of(recorder.to_bytes())).to_bytes()


def hot_layer(path: Path, trace: bytes, packing: Packing) -> Path:
    with open_stack(EXT4) as disk, path.open("wb") as file, packing.around(file) as sink:
        write_hot_layer(disk, trace, sink)
    return path


def served(registry: FaultyRegistry, paths: list[Path]) -> ImageConfig:
    lowers = tuple(
        LowerConfig(digest=registry.add_blob(path.read_bytes()), size=path.stat().st_size) for path in paths
    )
    return ImageConfig(repo_blob_url=registry.repository().blobs_url, lowers=lowers)


@pytest.mark.parametrize("packing", [Packing(tar=True), Packing("zstd", 32768), Packing("")])
def test_the_disk_is_the_same_and_what_was_read_comes_from_the_layer(tmp_path: Path, packing: Packing) -> None:
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, READS), packing)
    with open_stack([*EXT4, hot]) as disk:
        assert is_hot(disk.layers[-1])
        assert not is_hot(disk.layers[0])
        assert disk.layers[-1].parent_uuid == disk.layers[-2].uuid  # type: ignore[attr-defined]
        assert sha256_of(disk) == EXT4_SHA256
        recorder = Recorder()
        disk.watch(recorder.around)
        for offset, length in READS:
            disk.read_at(offset, length)
        touched = {layer for layer, _, _ in reads_of(recorder.to_bytes())}
        # As a trace, it names what was read, at both ends up to the block of the file system, and small gaps.
        told = trace_of_hot_layer(disk)
        assert told is not None
        read, named = (Trace.from_reads(reads) for reads in (reads_of(recorder.to_bytes()), told.reads()))
        assert difference(read, named) == []
        assert all(end - begin < 65536 + 8192 for _, begin, end in difference(named, read))
    assert touched == {2}
    with open_stack(EXT4) as disk:
        assert trace_of_hot_layer(disk) is None


def test_a_start_that_reads_a_little_beside_finds_it_there(tmp_path: Path) -> None:
    # One read with gaps of 32 KiB, one of 96 KiB; the reads of another start lie in the gaps.
    with open_stack(EXT4) as disk:
        begin, end = max(zip(*disk_ranges(disk), strict=True), key=lambda each: each[1] - each[0])
    at = begin * 512
    assert (end - begin) * 512 > 300_000
    reads = [(at, 4096), (at + (36 << 10), 4096), (at + (136 << 10), 4096)]
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, reads), Packing(""))
    with open_stack([*EXT4, hot]) as disk:
        layers = {owned.layer for owned in disk.owners(at, at + (40 << 10))}
        assert layers == {2}
        assert 2 not in {owned.layer for owned in disk.owners(at + (41 << 10), at + (135 << 10))}
        # In the file, what was read comes first, what lies between last.
        segments = disk.layers[2].index.segments()
        rows = sorted((moffset, offset) for offset, _, moffset, _, _ in segments.rows())
        assert [offset * 512 for _, offset in rows] == [reads[0][0], reads[1][0], reads[2][0], at + 4096]


def test_sectors_are_those_of_the_reads() -> None:
    trace = Trace.from_bytes(trace_of(EXT4, READS))
    with open_stack(EXT4) as disk:
        wanted: set[int] = set()
        for offset, length in READS:
            for begin, count, source, _ in disk.index.lookup(offset // 512, -(-(offset + length) // 512)):
                wanted |= set(range(begin, begin + count)) if source >= 0 else set()
        sectors = sectors_of_reads(trace.reads(), disk)
        assert {sector for begin, end in sectors for sector in range(begin, end)} == wanted
        # Headers and indexes are nothing of the disk, and what another layer hides is not seen.
        assert sectors_of_reads([(0, 0, 4096), (0, disk.layers[0].data.size - 4096, 4096)], disk) == []


def test_an_image_with_one_reads_all_of_it_by_one_request(tmp_path: Path) -> None:
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, READS), Packing(tar=True))
    own = Settings(cache_dir=tmp_path / "cache", cache_unit=4096, read_deadline_s=20)
    with faulty_registry() as registry:
        config = served(registry, [*EXT4, hot])
        with open_image(config, own) as image:
            assert isinstance(image, Image)
            _until_complete(registry, config, image)
            opened = len(registry.requests)
            for offset, length in READS:
                assert len(image.read_at(offset, length)) == length
            assert len(registry.requests) == opened
            assert image.statistics()["demand_bytes"] < 8 * 64 * 1024
            assert sha256_of(image) == EXT4_SHA256
        asked = [r.range for r in registry.requests[:opened] if config.lowers[2].digest in r.path]
        assert len(asked) <= 4  # both ends, perhaps the index, and the rest


@pytest.mark.parametrize(
    "packing", [Packing(tar=True), Packing("zstd", 16384, tar=True), Packing("zstd", 4096), Packing("")]
)
def test_it_is_known_by_its_beginning(tmp_path: Path, packing: Packing) -> None:
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, READS), packing)
    with faulty_registry() as registry:
        config = served(registry, [EXT4[0], hot])
        with closing(RemoteLayers(config.repo_blob_url, Settings(cache_dir=tmp_path / "cache"))) as remote:
            for lower, expected in zip(config.lowers, (False, True), strict=True):
                blob = remote.open(lower.digest, lower.size)
                stream = stream_if_begins_hot(blob, min(BEGINNING, blob.size))
                assert (stream is not None) == expected
                if stream is not None:
                    assert stream.wait(60)
                    before = len(registry.requests)
                    assert blob.read_at(0, blob.size) == hot.read_bytes()
                    assert len(registry.requests) == before
                blob.close()


def test_what_its_configuration_calls_hot_is_fetched_by_the_first_request(tmp_path: Path) -> None:
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, READS), Packing("zstd", 32768, tar=True))
    with faulty_registry() as registry:
        config = served(registry, [*EXT4, hot])
        config = replace(config, lowers=(*config.lowers[:2], replace(config.lowers[2], hot=True)))
        own = Settings(cache_dir=tmp_path / "cache", cache_unit=4096, read_deadline_s=20)
        with open_image(config, own) as image:
            assert isinstance(image, Image)
            _until_complete(registry, config, image)
            assert sha256_of(image) == EXT4_SHA256
        asked = [each.range for each in registry.requests if config.lowers[2].digest in each.path]
        assert str(asked[0]).startswith("bytes=0-")
        assert len(asked) <= 3  # that, and the end, whose last unit somebody may need before the rest is asked for
        spans = [str(each).removeprefix("bytes=").split("-") for each in asked]
        assert sum(int(last) - int(first) + 1 for first, last in spans) == config.lowers[2].size


def test_what_is_called_hot_and_is_not_is_read_all_the_same(tmp_path: Path) -> None:
    with faulty_registry() as registry:
        config = served(registry, EXT4)
        config = replace(config, lowers=tuple(replace(lower, hot=True) for lower in config.lowers))
        with open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            assert isinstance(image, Image)
            assert sha256_of(image) == EXT4_SHA256


@settings(max_examples=50, deadline=None)
@given(noise=st.binary(min_size=1, max_size=400), at=st.integers(0, 2000))
def test_a_damaged_beginning_is_none(tmp_path: Path, noise: bytes, at: int) -> None:
    hot = tmp_path / "hot"
    if not hot.exists():
        hot_layer(hot, trace_of(EXT4, READS), Packing("zstd", 16384))
    content = hot.read_bytes()[: 32 << 10]
    damaged = content[:at] + noise + content[at + len(noise) :]
    assert begins_hot(MemoryBlob(damaged), len(damaged)) in (True, False)


def test_one_that_cannot_be_fetched_leaves_the_image_as_it_was(tmp_path: Path) -> None:
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, READS), Packing(tar=True))
    with faulty_registry() as registry:
        config = served(registry, [*EXT4, hot])
        config = replace(config, lowers=(*config.lowers[:2], replace(config.lowers[2], digest="sha256:" + "0" * 64)))
        own = Settings(cache_dir=tmp_path / "cache", open_deadline_s=5)
        with pytest.raises(Exception, match="lower 2 of 3"):
            open_image(config, own)


def test_one_that_is_damaged_at_its_end_is_not_fetched_on(tmp_path: Path) -> None:
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, READS), Packing("zstd", 16384))
    content = hot.read_bytes()
    hot.write_bytes(content[:-1024] + bytes(512) + content[-512:])  # its index
    with faulty_registry() as registry:
        config = served(registry, [*EXT4, hot])
        with pytest.raises(ImageOpenError, match="lower 2 of 3"):
            open_image(config, Settings(cache_dir=tmp_path / "cache", open_deadline_s=20))
        deadline = time.monotonic() + 60
        while any(thread.name == "obdlab-stream" for thread in threading.enumerate()):
            assert time.monotonic() < deadline, "the stream goes on"
            time.sleep(0.01)


def test_traces_that_name_nothing_or_another_image() -> None:
    with open_stack(EXT4) as disk:
        with pytest.raises(NothingHotError, match="names nothing"):
            write_hot_layer(disk, Trace.from_reads([(0, 0, 512)]).to_bytes(), io.BytesIO(), name="t")
        with pytest.raises(FormatError, match="not of this image"):
            write_hot_layer(disk, Trace.from_reads([(7, 0, 512)]).to_bytes(), io.BytesIO(), name="t")


def test_a_priority_list_makes_one(tmp_path: Path) -> None:
    out = io.BytesIO()
    with open_stack(EXT4) as disk:
        write_hot_layer(disk, b"/bin/\n/etc/\n/usr/\n/lib/\n", out)
        from obdlab.blob import MemoryBlob

        layer = LsmtLayer(MemoryBlob(out.getvalue()))
        assert sha256_of(Stack([*disk.layers, layer])) == EXT4_SHA256


def _until_complete(registry: FaultyRegistry, config: ImageConfig, image: Image) -> None:
    deadline = time.monotonic() + 60
    size = config.lowers[2].size
    while time.monotonic() < deadline:
        counted = image.statistics()
        if counted["prefetch_bytes"] and counted["prefetch_bytes"] + counted["demand_bytes"] >= size:
            return
        time.sleep(0.01)
    raise AssertionError(f"the hot layer was not fetched: {image.statistics()}, {registry.requests}")
