"""The length of a read: Python calls of a miss from a registry on this machine, and of a hit."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pytest

from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.formats.oci import digest_of
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import open_image
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers.append import AppendUpper
from obdlab.registry.client import RegistryClient
from obdlab.registry.remoteblob import RemoteBlob
from obdlab.settings.settings import Settings
from tests.registry.faulty import faulty_registry

UNIT = 16 << 10
DATA = random.Random(1).randbytes(4 << 20)
# A second request for a lagging answer, or a look at the files that is due, adds calls to some reads.
READS = 12


@dataclass
class Way:
    """What one read went through, of this package: its calls, modules and depth."""

    calls: list[str] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    depth: int = 0


def path_of(action: Callable[[], object]) -> Way:
    found, depth = Way(), 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("obdlab."):
            return
        if event == "call":
            depth += 1
            found.depth = max(found.depth, depth)
            found.modules.add(module)
            found.calls.append(f"{'  ' * depth}{module} {frame.f_code.co_qualname}")
        elif event == "return":
            depth -= 1

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return found


def shortest(paths: list[Way]) -> Way:
    return min(paths, key=lambda path: len(path.calls))


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[CachedBlob]:
    client = RegistryClient()
    with faulty_registry() as registry:
        origin = RemoteBlob(client, registry.repository(), registry.add_blob(DATA), len(DATA))
        cache = BlockCache(tmp_path / "cache", unit=UNIT, extent=UNIT, readahead_max=0)
        with cache.open(origin, digest_of(DATA)) as blob:
            assert isinstance(blob, CachedBlob)
            blob.opened(60.0)
            yield blob
        client.close()


def test_a_miss_is_short(cached: CachedBlob) -> None:
    offsets = random.Random(2).sample(range(0, len(DATA), 4 * UNIT), READS)
    for offset in offsets[:2]:  # connections, files and the like
        cached.read_at(offset, UNIT)
    path = shortest([path_of(lambda at=offset: cached.read_at(at, UNIT)) for offset in offsets[2:]])
    text = "\n".join(path.calls)
    # 106 on a quiet machine; under load the shortest of the reads has now and then two more.
    assert len(path.calls) <= 110, text
    assert len(path.modules) <= 29, text
    assert path.depth <= 16, text
    assert sum("CacheFiles.present" in call for call in path.calls) == 1, text


def test_a_hit_is_shorter(cached: CachedBlob) -> None:
    cached.read_at(0, UNIT)
    cached.read_at(0, UNIT)
    assert len(shortest([path_of(lambda: cached.read_at(512, 4096)) for _ in range(READS)]).calls) == 1


def test_a_hit_of_an_image_takes_six_calls(tmp_path: Path) -> None:
    with AppendUpper.create(tmp_path / "data", tmp_path / "index", 1 << 20) as upper:
        upper.write_at(0, DATA[: 1 << 20])
        write_layer(upper, tmp_path / "layer", Packing("lz4", 4096, tar=True))
    file = (tmp_path / "layer").read_bytes()
    with faulty_registry() as registry:
        lower = LowerConfig(digest=registry.add_blob(file), size=len(file))
        config = ImageConfig(repo_blob_url=registry.repository().blobs_url, lowers=(lower,))
        with open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            image.read_at(8192, 4096)
            path = shortest([path_of(lambda: image.read_at(8192, 4096)) for _ in range(READS)])
    assert len(path.calls) <= 6, "\n".join(path.calls)
