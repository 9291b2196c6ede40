"""Images whose layers stay in a real registry."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.errors import CorruptBlobError, ObdlabError, SourceError
from obdlab.formats.oci import digest_of
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import ImageOpenError, WritableImage, open_image
from obdlab.layers.upper import SparseUpper
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from tests.layers.golden import GOLDEN, LSMT, manifest, sha256_of
from tests.registry.faulty import Answer, faulty_registry, slowly
from tests.registry.server import RegistryServer, running_registry

pytestmark = pytest.mark.registry

EXT4 = [GOLDEN / "ext4" / "layer1.obd", GOLDEN / "ext4" / "layer2.obd"]
EXT4_SHA256 = manifest("ext4")["merged"]["layers1-2"]["raw_sha256"]
# A disk of 1 MiB, where that of ext4 has 1 GiB.
LAYERS = [LSMT / "l1.lz4tar.lsmt", LSMT / "l2.lz4.lsmt"]
MERGED_SHA256 = next(entry["decoded_sha256"] for entry in manifest("lsmt")["entries"] if "stack" in entry)


def push(server: RegistryServer, name: str, paths: list[Path]) -> ImageConfig:
    """Put layers into a repository and return the image of them."""
    client = RegistryClient()
    repository = client.repository(Reference.parse(f"{server.host}/{name}:latest"))
    lowers = []
    for path in paths:
        data = path.read_bytes()
        digest = digest_of(data)
        client.push_blob(repository, digest, len(data), lambda path=path: path.open("rb"))
        lowers.append(LowerConfig(digest=digest, size=len(data)))
    client.close()
    return ImageConfig(repo_blob_url=repository.blobs_url, lowers=tuple(lowers))


def stored_blob(server: RegistryServer, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return server.storage / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", read_deadline_s=10, request_timeout_s=5)


@pytest.fixture(autouse=True)
def nothing_leaks() -> object:
    before = len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 60  # fetching ahead may be about to end
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        # urllib3 closes a pool's idle connections when the pool is collected, and an error's traceback keeps it.
        gc.collect()
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_image_from_the_registry_and_again_from_the_cache(
    registry_server: RegistryServer, settings: Settings
) -> None:
    config = push(registry_server, "open/image", EXT4)
    with open_image(config, settings) as image:
        opened = image.statistics()
        assert opened["demand_bytes"] < 600_000, "opening fetches the ends, not the whole"
        assert sha256_of(image) == EXT4_SHA256
        size = sum(lower.size for lower in config.lowers)
        counters = image.statistics()
        assert 0.9 * size < counters["demand_bytes"] + counters["readahead_bytes"] <= size
    with open_image(config, settings) as image:
        assert sha256_of(image) == EXT4_SHA256
        assert image.statistics()["requests"] == 0


def test_a_layer_is_opened_by_two_requests_at_once(settings: Settings) -> None:
    data = EXT4[0].read_bytes()
    together = threading.Barrier(2)

    def meet(answer: Answer) -> None:
        together.wait(60)
        answer.send()

    with faulty_registry() as registry:
        lower = LowerConfig(digest=registry.add_blob(data), size=len(data))
        registry.next(meet, meet)
        config = ImageConfig(repo_blob_url=registry.repository().blobs_url, lowers=(lower,))
        with open_image(config, settings) as image:
            assert image.statistics()["requests"] == 2
            assert image.statistics()["demand_bytes"] <= 5 * settings.cache_unit < len(data)
        assert not together.broken


def test_lowers_here_and_there(registry_server: RegistryServer, settings: Settings) -> None:
    config = push(registry_server, "open/mixed", LAYERS)
    config = replace(config, lowers=(LowerConfig(file=str(LAYERS[0])), config.lowers[1]))
    with open_image(config, settings) as image:
        assert sha256_of(image) == MERGED_SHA256


def test_writable_over_remote_lowers(registry_server: RegistryServer, settings: Settings, tmp_path: Path) -> None:
    SparseUpper.create(tmp_path / "data", 0).close()
    config = push(registry_server, "open/writable", LAYERS)
    config = replace(config, upper=UpperConfig(str(tmp_path / "index"), str(tmp_path / "data")))
    with open_image(config, settings) as image:
        assert isinstance(image, WritableImage)
        image.write_at(4096, b"x" * 4096)
        assert image.read_at(4000, 200) == image.read_at(4000, 96) + b"x" * 104
        assert image.statistics()["requests"] > 0


def test_a_size_that_is_not_known(registry_server: RegistryServer, settings: Settings) -> None:
    config = push(registry_server, "open/unsized", LAYERS)
    config = replace(config, lowers=tuple(replace(lower, size=0) for lower in config.lowers))
    with open_image(config, settings) as image:
        assert sha256_of(image) == MERGED_SHA256


def test_many_lowers_of_which_one_is_missing(registry_server: RegistryServer, settings: Settings) -> None:
    config = push(registry_server, "open/missing", [LSMT / "c1.empty.lsmt", LSMT / "l1.lz4.lsmt"])
    missing = "sha256:" + "ab" * 32
    lowers = (*config.lowers * 20, LowerConfig(digest=missing, size=9999), *config.lowers * 5)
    with pytest.raises(ImageOpenError, match=rf"lower 40 of 51 \({missing}\): .*404"):
        open_image(replace(config, lowers=lowers), settings)


def test_a_registry_that_is_not_there(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lower = LowerConfig(digest="sha256:" + "0" * 64, size=9999)
    config = ImageConfig(repo_blob_url=f"http://127.0.0.1:{port}/v2/x/blobs", lowers=(lower,) * 3)
    begin = time.monotonic()
    with pytest.raises(ImageOpenError, match=r"lower 2 of 3 .*0000.*127\.0\.0\.1"):
        open_image(config, replace(settings, open_deadline_s=1.5))
    assert time.monotonic() - begin < 60


def test_opening_has_a_deadline_of_its_own(settings: Settings) -> None:
    data = LAYERS[0].read_bytes()
    hasty = replace(settings, read_deadline_s=0.1, cache_unit=4096, readahead_max=0)
    with faulty_registry() as registry:
        lower = LowerConfig(digest=registry.add_blob(data), size=len(data))
        url = registry.repository().blobs_url
        registry.always(slowly(0.4))
        with (
            open_image(ImageConfig(repo_blob_url=url, lowers=(lower,)), hasty) as image,
            pytest.raises(SourceError, match=r"deadline|in time"),
        ):
            sha256_of(image)


@pytest.mark.parametrize("digest", ["sha256:../../../../etc/passwd", "sha256:00", "md5:" + "0" * 32, "x"])
def test_malformed_digests_touch_nothing(registry_server: RegistryServer, settings: Settings, digest: str) -> None:
    config = push(registry_server, "open/malformed", LAYERS[:1])
    with pytest.raises(ImageOpenError, match="not a digest"):
        open_image(replace(config, lowers=(LowerConfig(digest=digest, size=5),)), settings)
    assert not settings.cache_dir.exists()


def test_a_wrong_size_is_an_error(registry_server: RegistryServer, settings: Settings) -> None:
    config = push(registry_server, "open/size", LAYERS[:1])
    for change in (-4096, 4096):
        lower = replace(config.lowers[0], size=config.lowers[0].size + change)
        with pytest.raises(ImageOpenError, match="lower 0 of 1"):
            open_image(replace(config, lowers=(lower,)), replace(settings, open_deadline_s=1.5))


def test_a_blob_damaged_in_the_registry(settings: Settings, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as server:
        config = push(server, "open/damaged", EXT4[:1])
        path = stored_blob(server, config.lowers[0].digest)
        data = bytearray(path.read_bytes())
        data[500_000] ^= 1
        path.write_bytes(data)
        with open_image(config, settings) as image:
            begin = time.monotonic()
            with pytest.raises(CorruptBlobError, match=rf"{config.lowers[0].digest}: .* at offset 49\d\d\d\d"):
                sha256_of(image)
            assert time.monotonic() - begin < 60
            # What is sound can still be read.
            assert len(image.read_at(0, 4096)) == 4096


def test_a_damaged_cache_is_healed(registry_server: RegistryServer, settings: Settings) -> None:
    config = push(registry_server, "open/healed", LAYERS)
    with open_image(config, settings) as image:
        assert sha256_of(image) == MERGED_SHA256
    for path in settings.cache_dir.rglob("data"):
        with path.open("r+b") as file:
            for offset in range(0, path.stat().st_size, 50_000):
                file.seek(offset)
                file.write(b"damage")
    with open_image(config, settings) as image:
        assert sha256_of(image) == MERGED_SHA256
        assert image.statistics()["corrupt_units"] > 0


def test_a_registry_that_goes_away(settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, read_deadline_s=2)
    with running_registry(tmp_path / "registry") as server:
        config = push(server, "open/gone", EXT4[:1])
        image = open_image(config, settings)
    with image, pytest.raises(ObdlabError, match=config.lowers[0].digest):
        sha256_of(image)


def test_a_registry_that_is_down_is_told_within_the_open_deadline(tmp_path: Path) -> None:
    with socket.socket() as listener:  # bound, never accepting: connections are refused
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v2/x/blobs"
        lower = LowerConfig(digest="sha256:" + "0" * 64, size=1 << 20)
        began = time.monotonic()
        with pytest.raises(ImageOpenError, match="cannot open lower 0 of 1"):
            open_image(
                ImageConfig(repo_blob_url=url, lowers=(lower,)),
                Settings(cache_dir=tmp_path / "cache", read_deadline_s=600, open_deadline_s=0.5),
            )
        assert time.monotonic() - began < 300  # far from the read deadline
