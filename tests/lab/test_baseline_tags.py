"""The arms' tags: an image that an earlier converter stored is never measured as today's."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.convert import layer
from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.baselines.adapter import Source
from obdlab.lab.baselines.lazy import Lazy
from obdlab.lab.images.builder import BuiltImage
from obdlab.lab.images.recipe import Probe, Recipe

CONVERTED = sorted(name for name, adapter in ADAPTERS.items() if isinstance(adapter, Lazy))


def source(algorithm: str = "zstd", block_size: int = 16384) -> Source:
    image = BuiltImage(Recipe("small", "", Probe("ready", 1.0)), Path("layout"), "sha256:" + "1" * 64, ())
    return Source(image, algorithm, block_size, 128)


@pytest.mark.parametrize("name", CONVERTED)
def test_another_converter_gives_another_tag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ADAPTERS[name].tag(source())
    monkeypatch.setattr(layer, "OUTPUT_VERSION", layer.OUTPUT_VERSION + 1)
    assert ADAPTERS[name].tag(source()) != before


def test_each_form_has_its_own_tag() -> None:
    tags = [ADAPTERS[name].tag(source()) for name in CONVERTED]
    assert len(set(tags)) == len(CONVERTED) > 4
    assert all(len(tag) < 128 for tag in tags)


@pytest.mark.parametrize("name", sorted(set(CONVERTED) - {"obdlab-turbo"}))
def test_the_compression_is_part_of_the_tag(name: str) -> None:
    assert ADAPTERS[name].tag(source("lz4")) != ADAPTERS[name].tag(source())
