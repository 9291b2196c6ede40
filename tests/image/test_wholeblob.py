"""turboOCI layers from a registry that ignores ranges: the ordinary layers are fetched whole, once, and checked."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import obdlab
from obdlab.blob import Blob
from obdlab.cache.space import CacheFullError
from obdlab.convert.compare.listing import differences, list_volume
from obdlab.convert.turbo.builder import TurboBuilder
from obdlab.errors import CorruptBlobError, ObdlabError, SourceError
from obdlab.formats.oci import digest_of
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.remote import RemoteLayers
from obdlab.settings.settings import Settings
from obdlab.volumes.ext4.volume import Volume
from tests.convert.layouts import compress, member, tar_bytes
from tests.convert.turbo.test_builder import OPTIONS, add, listing_of
from tests.registry import faulty
from tests.registry.faulty import Answer, FaultyRegistry, faulty_registry

#: Longer than the part before a range that is skipped in an answer with the whole blob.
TARS = [
    tar_bytes([member(f"{seed + number}", random.Random(seed + number).randbytes(2 << 20)) for number in range(5)])
    for seed in (0, 50)
]


@dataclass(frozen=True)
class Place:
    lowers: tuple[LowerConfig, ...]
    targets: tuple[bytes, ...]


@pytest.fixture(scope="module", params=["plain", "gzip", "zstd frames"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = tmp_path_factory.mktemp("layers")
    targets = tuple(compress(tar, request.param) for tar in TARS)
    lowers = []
    with TurboBuilder(directory, OPTIONS, ("ext4",), zstd=True) as builder:
        for tar, target in zip(TARS, targets, strict=True):
            files = add(builder, directory, tar, blob=target).files
            index = next((str(path) for name, path in files.items() if name in ("gzip.meta", "zstd.meta")), "")
            (meta,) = (str(path) for name, path in files.items() if name.startswith("ext4."))
            digest, size, sums = digest_of(target), len(target), str(files["tar.sums"])
            lowers.append(
                LowerConfig(file=meta, gzip_index=index, target_digest=digest, target_size=size, tar_sums=sums)
            )
    return Place(tuple(lowers), targets)


@contextmanager
def registry_with(*targets: bytes) -> Iterator[FaultyRegistry]:
    with faulty_registry() as registry:
        for target in targets:
            registry.add_blob(target)
        registry.always(faulty.whole_blob)
        yield registry


def settings_of(directory: Path, **options: object) -> Settings:
    settings = Settings(cache_dir=directory / "cache", hosts_dir=directory / "hosts", readahead_max=0)
    return replace(settings, **options)  # type: ignore[arg-type]


def config_of(place: Place, registry: FaultyRegistry) -> ImageConfig:
    return ImageConfig(registry.repository().blobs_url, place.lowers)


def whole_requests(registry: FaultyRegistry) -> int:
    return sum(request.range is None for request in registry.blob_requests())


def is_right(disk: Blob) -> bool:
    return differences(list_volume(Volume(disk)), listing_of(TARS)) == []


def test_layers_are_fetched_whole_and_once(place: Place, tmp_path: Path) -> None:
    with registry_with(*place.targets) as registry:
        config, settings = config_of(place, registry), settings_of(tmp_path)
        with obdlab.open_image(config, settings) as disk:
            assert is_right(disk)
        assert whole_requests(registry) == len(place.targets)
        registry.always(faulty.status(404))
        with obdlab.open_image(config, settings) as disk:
            assert is_right(disk)


def test_readers_of_two_images_share_a_download(place: Place, tmp_path: Path) -> None:
    with registry_with(*place.targets) as registry:
        config, settings = config_of(place, registry), settings_of(tmp_path)
        right: list[bool] = []
        with obdlab.open_image(config, settings) as one, obdlab.open_image(config, settings) as two:
            threads = [
                threading.Thread(target=lambda disk=disk: right.append(is_right(disk))) for disk in (one, two) * 3
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert right == [True] * 6
        assert whole_requests(registry) == len(place.targets)


def test_a_layer_larger_than_the_cache_is_refused(place: Place, tmp_path: Path) -> None:
    with registry_with(*place.targets) as registry:
        settings = settings_of(tmp_path, cache_quota=8 << 20, cache_min_free=0)
        with (
            obdlab.open_image(config_of(place, registry), settings) as disk,
            pytest.raises(SourceError, match=r"ignores ranges.*larger than the cache \(got \d+ bytes.*cache_quota"),
        ):
            is_right(disk)
        assert whole_requests(registry) == 0


@contextmanager
def far_reads(target: bytes, registry: FaultyRegistry, settings: Settings) -> Iterator[Blob]:
    blobs_url = registry.repository().blobs_url
    with closing(RemoteLayers(blobs_url, settings)) as remote:
        remote.opened()
        with remote.open_target(digest_of(target), len(target), checked_above=False) as blob:
            yield blob


DATA = random.Random(7).randbytes(6 << 20)
FAR = 5 << 20


def test_forged_whole_blobs_are_not_kept(tmp_path: Path) -> None:
    def forging(answer: Answer) -> None:
        answer.whole = answer.whole[:-1] + bytes([answer.whole[-1] ^ 1])
        if answer.status == 200:
            answer.body = answer.whole
        faulty.whole_blob(answer)

    with registry_with(DATA) as registry, far_reads(DATA, registry, settings_of(tmp_path)) as blob:
        registry.always(forging)
        with pytest.raises(SourceError, match="wrong content") as caught:
            blob.read_at(FAR, 4096)
        assert isinstance(caught.value.__cause__, CorruptBlobError)
        # A download that failed is not begun again at once.
        with pytest.raises(SourceError, match="wrong content"):
            blob.read_at(FAR, 4096)
        assert whole_requests(registry) == 1
        registry.always(faulty.status(404))
        with pytest.raises(ObdlabError, match="404"):  # nothing of it is in the cache
            blob.read_at(0, 4096)


def test_a_cache_that_keeps_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise CacheFullError(errno.ENOSPC, "cache is full")

    with registry_with(DATA) as registry, far_reads(DATA, registry, settings_of(tmp_path)) as blob:
        assert blob.read_at(0, 4096) == DATA[:4096]
        monkeypatch.setattr("obdlab.cache.space.CacheSpace._check_room", full)
        with pytest.raises(SourceError, match="the cache does not keep it"):
            blob.read_at(FAR, 4096)


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_blob_of_another_size_is_refused(tmp_path: Path, difference: int) -> None:
    with registry_with(DATA) as registry:
        registry.blobs[digest_of(DATA)] = DATA[:difference] if difference < 0 else DATA + b"x"
        with (
            far_reads(DATA, registry, settings_of(tmp_path)) as blob,
            pytest.raises(SourceError, match="another size"),
        ):
            blob.read_at(FAR, 4096)


def test_a_reader_waits_no_longer_than_its_deadline_and_the_download_goes_on(tmp_path: Path) -> None:
    go_on = threading.Event()

    def late(answer: Answer) -> None:
        if answer.handler.headers.get("Range") is None:
            go_on.wait(30)
        faulty.whole_blob(answer)

    with registry_with(DATA) as registry:
        registry.always(late)
        with far_reads(DATA, registry, settings_of(tmp_path, read_deadline_s=1.0)) as blob:
            began = time.monotonic()
            with pytest.raises(SourceError, match=r"did not come in time \(got 0 of 6291456 bytes") as caught:
                blob.read_at(FAR, 4096)
            assert caught.value.temporary
            assert time.monotonic() - began < 10
            go_on.set()
            end = time.monotonic() + 30
            while time.monotonic() < end:
                try:
                    assert blob.read_at(FAR, 4096) == DATA[FAR : FAR + 4096]
                    break
                except SourceError:
                    time.sleep(0.1)
            else:
                pytest.fail("it never came")
        assert whole_requests(registry) == 1


def test_closing_ends_a_download(tmp_path: Path) -> None:
    def slow(answer: Answer) -> None:
        ranged = answer.handler.headers.get("Range") is not None
        (faulty.whole_blob if ranged else faulty.dripping(0.05))(answer)

    with registry_with(DATA) as registry:
        registry.always(slow)
        settings = settings_of(tmp_path, read_deadline_s=1.0)
        with far_reads(DATA, registry, settings) as blob, pytest.raises(SourceError, match="in time"):
            blob.read_at(FAR, 4096)
    end = time.monotonic() + 30
    while any(thread.name == "obdlab-whole" for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(thread.name == "obdlab-whole" for thread in threading.enumerate())
