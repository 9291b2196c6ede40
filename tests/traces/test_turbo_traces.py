"""Traces and hot layers of turboOCI images: reads of the targets are recorded and replayed like all others."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.formats.oci import digest_of
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import Image, open_image, open_warp
from obdlab.layers.lsmt import open_layer
from obdlab.layers.recorder import Recorder, reads_of
from obdlab.layers.stack import Stack
from obdlab.layers.warp import WarpLayer, parts_of
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.traces.hotlayer import is_hot, write_hot_layer
from tests.cache.origin import wait_until
from tests.layers.golden import TURBO
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.registry

NAMES = ("l1", "l2", "l3")


@pytest.fixture
def config(registry_server: RegistryServer) -> ImageConfig:
    """The original's chain, with all but the gzip indexes in a registry."""
    client = RegistryClient()
    repository = client.repository(Reference.parse(f"{registry_server.host}/trace/turbo:latest"))

    def push(name: str) -> str:
        data = (TURBO / name).read_bytes()
        client.push_blob(repository, digest_of(data), len(data), lambda: io.BytesIO(data))
        return digest_of(data)

    lowers = [
        LowerConfig(
            digest=push(f"{name}.ext4.fs.meta"),
            target_digest=push(f"{name}.tar.gz"),
            gzip_index=str(TURBO / f"{name}.gzip.meta"),
        )
        for name in NAMES
    ]
    client.close()
    return ImageConfig(repo_blob_url=repository.blobs_url, lowers=tuple(lowers))


def some_ranges() -> list[tuple[int, int]]:
    """Ranges of the disk: a little metadata, and contents of every layer that nothing above hides."""
    ranges = [(1024, 1024)]
    with open_warp(*(TURBO / f"l3.{kind}" for kind in ("ext4.fs.meta", "tar.gz", "gzip.meta"))) as disk:
        rows = disk.index.segments().rows()
        ranges += [(begin * 512, length * 512) for begin, length, *_ in rows[5:30:3]]
    return ranges


def test_a_start_is_recorded_and_replayed(config: ImageConfig, tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "first", cache_unit=4096, readahead_max=0)
    trace = tmp_path / "trace"
    trace.touch()
    ranges = some_ranges()
    with open_image(replace(config, record_trace_path=str(trace)), settings) as image:
        assert isinstance(image, Image)
        wanted = [image.read_at(begin, length) for begin, length in ranges]
        layers = image.layers
    reads = Trace.from_bytes(trace.read_bytes()).reads()
    kinds = {
        (number, part is layers[number].target)
        for number, offset, length in reads
        for part, _, _ in parts_of(layers[number].data, offset, offset + length)
        if isinstance(layers[number], WarpLayer)
    }
    assert {(2, True), (2, False), (0, False)} <= kinds

    settings = replace(settings, cache_dir=tmp_path / "second", trace_path=trace)
    with open_image(config, settings) as image:
        wait_until(lambda: "obdlab-prefetch" not in [thread.name for thread in threading.enumerate()])
        prefetched = image.statistics()
        assert prefetched["prefetch_bytes"] > 0
        assert [image.read_at(begin, length) for begin, length in ranges] == wanted
        assert image.statistics()["requests"] == prefetched["requests"], "everything that was read had been fetched"


def test_a_hot_layer_on_top_changes_nothing(config: ImageConfig, tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "cache")
    with open_image(config, settings) as image:
        assert isinstance(image, Image)
        ranges = some_ranges()
        recorder = Recorder()
        image.watch(recorder.around)
        wanted = [image.read_at(begin, length) for begin, length in ranges]
        image.watch(None)
        sink = io.BytesIO()
        committed = write_hot_layer(image, Trace.from_reads(reads_of(recorder.to_bytes())).to_bytes(), sink)
        assert committed.data_sectors * 512 >= sum(length for _, length in ranges)
        hot = open_layer(MemoryBlob(sink.getvalue()))
        assert is_hot(hot)
        stack = Stack([*image.layers, hot])
        assert [stack.read_at(begin, length) for begin, length in ranges] == wanted
        assert stack.read_at(0, 8 << 20) == image.read_at(0, 8 << 20)
