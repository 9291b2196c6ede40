"""The ends of layers fetched before an image is opened."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.errors import ObdlabError
from obdlab.image import open as opening
from obdlab.image import priming
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import Image, open_image
from obdlab.image.priming import prime, prime_start
from obdlab.layerfiles.writing import Packing
from obdlab.settings.settings import Settings
from tests.layers.golden import sha256_of
from tests.registry.faulty import faulty_registry, status
from tests.traces.test_hotlayer import EXT4, EXT4_SHA256, READS, hot_layer, served, trace_of


def test_opening_asks_for_nothing_more(tmp_path: Path) -> None:
    own = Settings(cache_dir=tmp_path / "cache")
    with faulty_registry() as registry:
        config = served(registry, EXT4)
        prime(config, own)
        asked = len(registry.requests)
        assert 0 < asked <= 3 * len(EXT4)
        prime(config, own)
        with open_image(config, own) as image:
            assert isinstance(image, Image)
            assert len(registry.requests) == asked
            assert sha256_of(image) == EXT4_SHA256


def test_a_primed_image_is_opened_without_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Threads(ThreadPoolExecutor):
        def submit(self, *arguments: object, **_: object) -> Future[object]:
            raise AssertionError(arguments)

    own = Settings(cache_dir=tmp_path / "cache")
    with faulty_registry() as registry:
        config = served(registry, EXT4)
        prime(config, own)
        monkeypatch.setattr(opening, "ThreadPoolExecutor", Threads)
        before = set(threading.enumerate())
        with open_image(config, own) as image:
            assert set(threading.enumerate()) <= before  # the registry's may end meanwhile
            assert sha256_of(image) == EXT4_SHA256


def test_one_that_cannot_be_had_keeps_no_other_from_it(tmp_path: Path) -> None:
    own = Settings(cache_dir=tmp_path / "cache", open_deadline_s=5)
    with faulty_registry() as registry:
        config = served(registry, EXT4)
        missing = replace(config.lowers[0], digest="sha256:" + "0" * 64)
        with pytest.raises(ObdlabError, match="404"):
            prime(replace(config, lowers=(missing, *config.lowers)), own)
        asked = len(registry.requests)
        with open_image(config, own):
            assert len(registry.requests) == asked


def test_what_is_no_layer_is_for_who_opens_it(tmp_path: Path) -> None:
    own = Settings(cache_dir=tmp_path / "cache")
    with faulty_registry() as registry:
        config = ImageConfig(repo_blob_url=registry.repository().blobs_url)
        for data in (b"x", b"x" * 5000, bytes(300_000)):
            prime(replace(config, lowers=(LowerConfig(digest=registry.add_blob(data), size=len(data)),)), own)


def test_a_registry_that_does_not_answer_is_waited_for_only_so_long(tmp_path: Path) -> None:
    with faulty_registry() as registry:
        config = served(registry, EXT4)
        registry.always(status(503))
        with pytest.raises(ObdlabError, match="503"):
            prime(config, Settings(cache_dir=tmp_path / "cache", open_deadline_s=1))


def test_nothing_remote_needs_nothing(tmp_path: Path) -> None:
    prime(ImageConfig(lowers=(LowerConfig(file=str(EXT4[0])),)), Settings(cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("named", [True, False])
def test_the_hot_layer_of_an_image_comes_whole(tmp_path: Path, named: bool) -> None:
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, READS), Packing("zstd", 16384, tar=True))
    own = Settings(cache_dir=tmp_path / "cache")
    with faulty_registry() as registry:
        config = served(registry, [*EXT4, hot])
        config = replace(config, lowers=(*config.lowers[:2], replace(config.lowers[2], hot=named)))
        prime(config, own)
        before = len(registry.requests)
        prime_start(config, own)
        assert 0 < len(registry.requests) - before <= 2
        asked = len(registry.requests)
        prime_start(config, own)
        with open_image(config, own) as image:
            for offset, length in READS:
                assert len(image.read_at(offset, length)) == length
            assert len(registry.requests) == asked
            assert sha256_of(image) == EXT4_SHA256


@pytest.mark.parametrize("named", [True, False])
def test_a_large_hot_layer_waits_for_its_start(tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = hot_layer(tmp_path / "hot", trace_of(EXT4, READS), Packing("zstd", 16384, tar=True))
    monkeypatch.setattr(priming, "MOST_AT_PULL", hot.stat().st_size - 1)
    own = Settings(cache_dir=tmp_path / "cache")
    with faulty_registry() as registry:
        config = served(registry, [*EXT4, hot])
        config = replace(config, lowers=(*config.lowers[:2], replace(config.lowers[2], hot=named)))
        prime(config, own)
        asked = len(registry.requests)
        prime_start(config, own)
        assert len(registry.requests) == asked


def test_a_trace_knows_better(tmp_path: Path) -> None:
    own = Settings(cache_dir=tmp_path / "cache")
    with faulty_registry() as registry:
        config = served(registry, EXT4)
        prime_start(replace(config, trace=config.lowers[0]), own)
        prime_start(replace(config, acceleration_layer=True), own)
        prime_start(config, replace(own, trace_path=tmp_path / "trace"))
        prime_start(ImageConfig(lowers=(LowerConfig(file=str(EXT4[0])),)), own)
        assert registry.requests == []
