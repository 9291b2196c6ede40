"""Metadata first: opening an image fetches what walking its tree reads."""

from __future__ import annotations

import random
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from obdlab.blob import MemoryBlob, find
from obdlab.cache.cachedblob import CachedBlob
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions
from obdlab.convert.layer import LayerOptions
from obdlab.convert.publish.ordered import order_layers
from obdlab.image import metadata
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import Image, open_image
from obdlab.image.priming import prime, prime_start
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.registry import RegistryHost
from obdlab.layers.front import front_of, has_front
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.registry.client import RegistryClient
from obdlab.settings.settings import Settings
from obdlab.volumes.detect import FileTree
from tests.benchmarks.cold_walk import WALKS, rounds, walk
from tests.convert.converting import convert
from tests.convert.layouts import directory, make_layout, member, symlink
from tests.image.test_open_depth import Rounds
from tests.registry.faulty import faulty_registry, status

if TYPE_CHECKING:
    from pathlib import Path

    from tests.convert.layouts import Member

DIRECTORIES, FILES = 40, 12


def members(number: int) -> list[Member]:
    """Layer ``number``: directories of its own and shared ones, files that do not compress, long links."""
    rng = random.Random(number)
    made = [directory("shared/"), member("shared/large" + str(number), rng.randbytes(1 << 20))]
    for at in range(DIRECTORIES):
        where = f"{'shared' if at % 2 else 'own' + str(number)}/d{at:02d}/"
        made.append(directory(where))
        sizes = rng.choices([100, 3000, 9000, 20_000], k=FILES)
        made += [member(f"{where}{number}-{file}", rng.randbytes(size)) for file, size in enumerate(sizes)]
        made.append(symlink(f"{where}link{number}", "x" * 20))
    return made


@pytest.fixture(scope="module", params=["ext4", "erofs"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with a converted image of three layers."""
    root = tmp_path_factory.mktemp("metadata")
    make_layout(root / "oci", [members(number) for number in range(3)])
    options = ConvertOptions(layer=LayerOptions(filesystem=request.param), work_dir=root, database="")
    convert(f"oci:{root / 'oci'}", f"oci:{root / 'obd'}", options)
    return root / "obd"


def blobs_of(layout: Path) -> list[bytes]:
    found = OciLayout(layout)
    return [found.blob_path(each.digest).read_bytes() for each in found.manifest.layers]


def fetched(image: Image) -> list[int]:
    """Wait until the fronts of all layers are in the cache; return their sizes."""
    fronts = []
    deadline = time.monotonic() + 60
    for layer in image.layers:
        assert isinstance(layer, LsmtLayer)
        assert has_front(layer)
        blob = find(layer.data, CachedBlob)
        assert blob is not None
        fronts.append(front_of(layer, blob))
        while (missing := blob.missing_piece(0)) is not None and missing[0] * blob.unit < fronts[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    return fronts


def walked(image: Image) -> list[tuple[bytes, int]]:
    tree: Any = FileTree(image).volume
    return [(path, inode.size) for path, _, inode in tree.walk()]


def test_a_walk_asks_for_nothing_once_an_image_is_open(converted: Path, tmp_path: Path) -> None:
    files = blobs_of(converted)
    with faulty_registry() as registry:
        lowers = tuple(LowerConfig(digest=registry.add_blob(file), size=len(file)) for file in files)
        config = ImageConfig(repo_blob_url=registry.repository().blobs_url, lowers=lowers)
        with open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            assert isinstance(image, Image)
            fronts = fetched(image)
            assert sum(fronts) < sum(map(len, files)) / 8
            asked = len(registry.requests)
            registry.always(status(503))
            seen = walked(image)
            half = DIRECTORIES // 2
            assert len(seen) == 2 + 3 * (2 + half * (FILES + 2)) + half * (1 + 3 * (FILES + 1))
            assert len(registry.requests) == asked


def test_after_a_pull_neither_opening_nor_a_walk_asks_for_anything(converted: Path, tmp_path: Path) -> None:
    files = blobs_of(converted)
    own = Settings(cache_dir=tmp_path / "cache")
    with faulty_registry() as registry:
        lowers = tuple(LowerConfig(digest=registry.add_blob(file), size=len(file)) for file in files)
        config = ImageConfig(repo_blob_url=registry.repository().blobs_url, lowers=lowers)
        prime(config, own)
        prime_start(config, own)
        asked = len(registry.requests)
        assert asked <= 4 * len(files)
        registry.always(status(503))
        with open_image(config, own) as image:
            assert isinstance(image, Image)
            assert walked(image)
            assert len(registry.requests) == asked


def test_the_fronts_of_all_layers_together_are_bounded(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = blobs_of(converted)
    with faulty_registry() as registry:
        lowers = tuple(LowerConfig(digest=registry.add_blob(file), size=len(file)) for file in files)
        config = ImageConfig(repo_blob_url=registry.repository().blobs_url, lowers=lowers)
        with open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            assert isinstance(image, Image)
            fronts = fetched(image)
            begun = []
            monkeypatch.setattr(metadata.StreamAhead, "start", lambda stream: begun.append(stream))
            for most, count in ((sum(fronts), 3), (sum(fronts) - 1, 2), (fronts[-1], 1), (0, 0)):
                begun.clear()
                monkeypatch.setattr(metadata, "MOST_FRONT", most)
                # The topmost layers come first: a start reads more of them.
                names = [stream.name for stream in metadata.stream_metadata(image.layers)]
                assert len(names) == len(begun) == count
                assert names == [find(layer.data, CachedBlob).name for layer in reversed(image.layers)][:count]


def test_opening_and_a_walk_wait_for_two_answers(converted: Path, tmp_path: Path) -> None:
    with faulty_registry() as registry:
        lowers = tuple(LowerConfig(digest=registry.add_blob(file), size=len(file)) for file in blobs_of(converted))
        waits = Rounds()
        registry.always(waits)
        config = ImageConfig(repo_blob_url=registry.repository().blobs_url, lowers=lowers)
        with open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            assert isinstance(image, Image)
            walked(image)
        assert max(waits.depth(path) for path in waits.spans) <= 2
        every = Rounds()
        every.spans["all"] = [span for spans in waits.spans.values() for span in spans]
        assert every.depth("all") <= 2


def test_layers_that_are_ordered_by_a_trace_no_longer_tell_of_a_front(converted: Path, tmp_path: Path) -> None:
    with (
        closing(RegistryClient()) as client,
        closing(open_source(f"oci:{converted}", client)) as source,
        closing(open_destination(f"oci:{tmp_path / 'new'}", client)) as target,
    ):
        order_layers(source, target, b"/own1/d00/1-0\n", work_dir=tmp_path)
    told = []
    for number, file in enumerate(blobs_of(tmp_path / "new")):
        layer = open_layer(MemoryBlob(file))
        told.append(has_front(layer))
        assert told[-1] or layer.user_tag.rstrip("\0") == ""
        assert (file == blobs_of(converted)[number]) == told[-1]
    assert any(told)
    assert not told[1]


@pytest.mark.kernel
@pytest.mark.registry
def test_the_kernel_walks_after_three_round_trips(converted: Path, tmp_path: Path, state_dir: Path) -> None:
    rtt_ms = 150.0  # so that waits for a busy processor do not count as round trips
    with (
        ExperimentNetwork(100, rtt_ms, state_dir=state_dir) as network,
        RegistryHost(tmp_path / "registry", network) as host,
    ):
        reference = host.push_layout(converted, "walk/image")
        (tmp_path / "walk").mkdir()
        requests = walk(host, reference, WALKS["du"], tmp_path / "walk")
        assert requests
        assert rounds(requests, rtt_ms / 1000) <= 3
        assert sum(request.written for request in requests) < sum(map(len, blobs_of(converted))) / 4
