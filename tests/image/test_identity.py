"""The name of an unpacked disk, told from the configuration alone, is the one that opening the image gives."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.identity import expected_name, name_of
from obdlab.image.open import Image, open_image
from obdlab.layerfiles.flatten import FlattenError, flat_name
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from tests.registry.server import RegistryServer

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
FILES = [LowerConfig(file=str(GOLDEN / f"layer{number}.obd")) for number in (1, 2)]
DIGESTS = [LowerConfig(digest=f"sha256:{number:064x}", size=4096) for number in range(3)]


def of(*lowers: LowerConfig, url: str = "https://registry.test/v2/a/blobs", acceleration: bool = False) -> str | None:
    return expected_name(ImageConfig(url, lowers, acceleration_layer=acceleration))


@pytest.mark.parametrize("numbers", [[0], [0, 1], [1, 0], [0, 1, 0], [0, 0]])
def test_local_layers(tmp_path: Path, numbers: list[int]) -> None:
    config = ImageConfig(lowers=tuple(FILES[number] for number in numbers))
    with open_image(config, Settings(cache_dir=tmp_path)) as image:
        assert isinstance(image, Image)
        assert flat_name(image) == expected_name(config)


def test_another_layer_in_the_same_file_with_the_same_times(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    names = set()
    for number in (1, 2):
        layer.write_bytes((GOLDEN / f"layer{number}.obd").read_bytes()[:4096])
        os.utime(layer, ns=(0, 0))
        names.add(of(LowerConfig(file=str(layer))))
    assert len(names) == 2


@pytest.mark.registry
def test_layers_of_a_registry_and_of_both(registry_server: RegistryServer, tmp_path: Path) -> None:
    client = RegistryClient()
    repository = client.repository(Reference.parse(f"{registry_server.host}/identity/golden:1"))
    layers, annotations = imagefiles.golden_layers()
    lowers = []
    for data, about in zip(layers, annotations, strict=True):
        digest = about[imagefiles.oci.BLOB_DIGEST]
        client.push_blob(repository, digest, len(data), lambda data=data: imagefiles.io.BytesIO(data))
        lowers.append(LowerConfig(digest=digest, size=len(data), dir=str(tmp_path / "none")))
    client.close()
    for chosen in ([lowers[0], lowers[1]], [FILES[0], lowers[1]], [lowers[0], lowers[1], lowers[0]]):
        config = ImageConfig(repository.blobs_url, tuple(chosen))
        with open_image(config, Settings(cache_dir=tmp_path / "cache")) as image:
            assert isinstance(image, Image)
            assert flat_name(image) == expected_name(config)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_other_layers_or_another_order_have_another_name(one: list[int], other: list[int]) -> None:
    names = [of(*(DIGESTS[number] for number in numbers)) for numbers in (one, other)]
    assert None not in names
    assert (names[0] == names[1]) == (one == other)


def test_the_layers_decide_and_their_registry() -> None:
    wanted = of(*DIGESTS[:2])
    assert wanted == of(*(replace(lower, dir="/none", size=1, hot=True) for lower in DIGESTS[:2]))
    assert wanted == of(*DIGESTS[:2], url="https://registry.test/v2/other/repository/blobs")
    assert wanted == of(*DIGESTS, acceleration=True)
    assert wanted != of(*DIGESTS[:2], url="https://other.test/v2/a/blobs")
    assert wanted != of(*DIGESTS[:2], url="http://registry.test/v2/a/blobs")


def test_a_changed_file_has_another_name(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.write_bytes(b"1")
    before = of(LowerConfig(file=str(layer)))
    layer.write_bytes(b"23")
    assert before
    assert of(LowerConfig(file=str(layer))) != before


def test_no_name_without_identity(tmp_path: Path) -> None:
    assert of() is None
    assert of(DIGESTS[0], acceleration=True) is None
    assert of(DIGESTS[0], LowerConfig(dir=str(tmp_path))) is None
    assert of(DIGESTS[0], url="") is None
    assert of(LowerConfig(file=str(tmp_path))) is None
    assert of(replace(DIGESTS[0], target_digest=DIGESTS[1].digest, gzip_index=str(tmp_path / "none"))) is None
    with open_image(ImageConfig(lowers=(FILES[0],)), Settings(cache_dir=tmp_path)) as image:
        assert isinstance(image, Image)
        image.identity = ("",)
        with pytest.raises(FlattenError, match="neither a digest nor a file"):
            flat_name(image)


def test_no_boundary_between_origin_and_layers_can_be_moved() -> None:
    assert name_of(["b", "c"], "a") != name_of(["c"], "ab")
    assert name_of(["a", "b"], "") != name_of(["b"], "a")
