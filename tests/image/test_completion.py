"""Images that complete themselves: at once over a fast link, later over a slow one, never in a reader's way."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obdlab.blob import find
from obdlab.cache.admin import entries
from obdlab.cache.cachedblob import CachedBlob
from obdlab.cache.eviction import EvictingSpace
from obdlab.cache.space import CacheSpace
from obdlab.cache.unpacked import FlatFiles
from obdlab.image.config import ImageConfig
from obdlab.image.open import Image, open_image
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.flatten import FlattenError, flat_name, flatten
from obdlab.layerfiles.writing import Packing
from obdlab.settings.settings import Settings
from tests.image.test_download import wait_until
from tests.image.test_open_remote import push
from tests.registry.server import RegistryServer, running_registry

pytestmark = pytest.mark.registry

MIB = 1 << 20
SIZE = 24 * MIB
DATA = random.Random(5).randbytes(SIZE)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layer")
    (folder / "disk.raw").write_bytes(DATA)
    import_disk(folder / "disk.raw", folder / "disk.obd", Packing(), kind="raw")
    return folder / "disk.obd"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The delay is longer than any test."""
    return Settings(cache_dir=tmp_path / "cache", completion_at_once=True, download_delay_s=1000, readahead_max=0)


def verified(settings: Settings) -> bool:
    return [entry.verified for entry in entries(CacheSpace(settings.cache_dir))] == [True]


def touch(image: Image, times: int = 4) -> None:
    """Read here and there, as a start does; the link is known then."""
    for number in range(times):
        offset = number * SIZE // times + 12345
        assert image.read_at(offset, 10) == DATA[offset : offset + 10]


def opened(config: ImageConfig, settings: Settings) -> Image:
    image = open_image(config, settings)
    assert isinstance(image, Image)
    return image


def test_all_of_it_comes_at_once(registry_server: RegistryServer, settings: Settings, layer: Path) -> None:
    config = push(registry_server, "completion/fast", [layer])
    with opened(config, settings) as image:
        touch(image)
        wait_until(lambda: verified(settings))
        counted = image.statistics()
        assert counted["background_bytes"] > SIZE // 2
        assert counted["demand_bytes"] + counted["background_bytes"] == config.lowers[0].size
        assert image.read_at(0, SIZE) == DATA
        assert image.statistics()["requests"] == counted["requests"]


def test_no_more_than_the_days_bytes(registry_server: RegistryServer, settings: Settings, layer: Path) -> None:
    config = push(registry_server, "completion/budget", [layer])
    small = replace(settings, completion_bytes_per_day=5 * MIB)
    with opened(config, small) as image:
        touch(image)
        wait_until(lambda: image.statistics()["background_bytes"] > 3 * MIB)
        time.sleep(0.3)
        assert image.statistics()["background_bytes"] <= 5 * MIB
        assert image.read_at(0, SIZE) == DATA
    with opened(config, small) as image:
        time.sleep(0.3)
        assert image.statistics()["background_bytes"] == 0


def test_not_over_a_metered_link(
    registry_server: RegistryServer, settings: Settings, layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obdlab.image.remote.metered", lambda: True)
    config = push(registry_server, "completion/metered", [layer])
    with opened(config, settings) as image:
        touch(image)
        time.sleep(0.3)
        assert image.statistics()["background_bytes"] == 0


@pytest.mark.kernel
def test_not_into_a_cache_without_room(
    registry_server: RegistryServer,
    settings: Settings,
    layer: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is fetched in vain, the log says why once, and it goes on when there is room."""
    caplog.set_level("INFO")
    monkeypatch.setattr("obdlab.cache.ahead.download._ROOM_LOOK_S", 0.05)
    config = push(registry_server, "completion/room", [layer])
    small = replace(settings, cache_quota=40 * MIB, cache_min_free=0)
    other = FlatFiles(EvictingSpace(small.cache_dir, quota=small.cache_quota))
    other.store("other", 20 * MIB, 20 * MIB, lambda offset, length: DATA[offset : offset + length])
    with opened(config, small) as image:
        touch(image)
        wait_until(lambda: "no room for all of it" in caplog.text)
        time.sleep(0.5)
        assert image.statistics()["background_bytes"] == 0
        assert caplog.text.count("no room for all of it") == 1
        assert other.path("other").exists(), "used a moment ago"
        monkeypatch.setattr("obdlab.cache.eviction.FRESH_S", -1.0)
        wait_until(lambda: image.unverified() == 0)
        assert not other.path("other").exists()
        assert image.read_at(0, SIZE) == DATA


def test_behind_a_shaped_link(state_dir: Path, tmp_path: Path, settings: Settings, layer: Path) -> None:
    """Counted, not timed: this machine may be busy, which makes the link look slower, never faster."""
    with (
        ExperimentNetwork(rate_mbit=100, rtt_ms=10, state_dir=state_dir) as network,
        running_registry(tmp_path / "registry", address=network.address, port=5000, enter=network.enter) as server,
    ):
        with network.unshaped():
            config = push(server, "completion/shaped", [layer])
        with opened(config, settings) as image:
            touch(image, 8)
            time.sleep(1)
            slow = image.statistics()
            assert slow["background_bytes"] == 0, "at 100 Mbit/s only what readers ask for is fetched"
            assert slow["demand_bytes"] < SIZE // 4
        soon = replace(settings, download_delay_s=0, download_delay_extra_s=0)
        before = network.counters()
        with opened(config, soon) as image:
            waited = []
            for number in range(12):
                offset = (number * 7 % 12) * 2 * MIB + MIB
                begun = image.statistics()["background_bytes"]
                assert image.read_at(offset, 10) == DATA[offset : offset + 10]
                waited.append(image.statistics()["background_bytes"] - begun)
            wait_until(lambda: verified(soon))
            assert max(waited) <= 256 << 10, "at most one request of the completion was in flight"
        assert network.counters().since(before).received < 1.1 * config.lowers[0].size


def test_by_default_only_a_device_completes_its_image(
    registry_server: RegistryServer, settings: Settings, layer: Path
) -> None:
    """Its server asks for it. A command that reads an image fetches what it reads, however long it takes."""
    config = push(registry_server, "completion/default", [layer])
    default = replace(settings, completion_at_once=False, download_delay_s=0, download_delay_extra_s=0)
    assert Settings().completion
    with opened(config, default) as image:
        touch(image)
        time.sleep(0.5)
        assert image.statistics()["background_bytes"] == 0
        assert not [thread for thread in threading.enumerate() if thread.name == "obdlab-download"]
        image.complete()
        wait_until(lambda: verified(default))
        assert image.read_at(0, SIZE) == DATA


def test_what_the_cache_lost_is_completed_again(
    registry_server: RegistryServer, settings: Settings, layer: Path
) -> None:
    config = push(registry_server, "completion/again", [layer])
    default = replace(settings, completion_at_once=False, download_delay_s=0, download_delay_extra_s=0)
    with opened(config, default) as image:
        image.complete()
        wait_until(lambda: verified(default))
        wait_until(lambda: not image.unverified())
        image.complete()  # nothing to do
        blob = find(image.layers[0].data, CachedBlob)
        assert blob is not None
        blob._units.drop(0, 1)
        assert image.unverified() == 1

        # The completion before may still be about to end, and ignores this call until then.
        def looked() -> bool:
            image.complete()
            return verified(default)

        wait_until(looked)
        assert image.read_at(0, SIZE) == DATA


def test_a_layer_that_loses_a_part_while_it_is_unpacked_is_not_kept(
    registry_server: RegistryServer, settings: Settings, layer: Path
) -> None:
    """The part comes from the registry again, and the layer's digest has not checked it."""
    config = push(registry_server, "completion/unpacked", [layer])
    files = FlatFiles(CacheSpace(settings.cache_dir))
    with opened(config, replace(settings, download_delay_s=0, download_delay_extra_s=0)) as image:
        wait_until(lambda: verified(settings))
        wait_until(lambda: not image.unverified())
        blob = find(image.layers[0].data, CachedBlob)
        assert blob is not None
        lost: list[int] = []

        def lose(offset: int, _: int) -> None:
            if offset >= 4 * MIB and not lost:
                lost.append(8 * MIB // blob.unit)
                blob._units.drop(lost[0], lost[0] + 1)

        with pytest.raises(FlattenError, match="did not stay in the cache"):
            flatten(image, files, lose)
        assert not files.path(flat_name(image)).parent.joinpath("disk.new").exists()
        assert not files.path(flat_name(image)).exists()


@pytest.mark.parametrize("changes", [{"completion": False}, {"download_delay_s": 1000.0}])
def test_nothing_more_comes_before_the_delay_or_with_the_switch_off(
    registry_server: RegistryServer, settings: Settings, layer: Path, changes: dict[str, Any]
) -> None:
    config = push(registry_server, "completion/later", [layer])
    later = replace(settings, completion_at_once=False, download_delay_s=0, download_delay_extra_s=0)
    with opened(config, replace(later, **changes)) as image:
        image.complete()
        touch(image)
        time.sleep(0.5)
        assert image.statistics()["background_bytes"] == 0


def test_the_switch_off_keeps_a_fast_link_idle(
    registry_server: RegistryServer, settings: Settings, layer: Path
) -> None:
    config = push(registry_server, "completion/off", [layer])
    with opened(config, replace(settings, completion=False)) as image:
        touch(image)
        image.complete()
        time.sleep(0.3)
        assert image.statistics()["background_bytes"] == 0


def test_a_download_that_was_asked_for_has_no_bytes_per_day(
    registry_server: RegistryServer, settings: Settings, layer: Path
) -> None:
    config = push(registry_server, "completion/download", [layer])
    asked = replace(settings, completion_at_once=False, completion_bytes_per_day=1, download_enabled=True)
    with opened(config, replace(asked, download_delay_s=0, download_delay_extra_s=0)) as image:
        image.complete()  # not twice
        wait_until(lambda: verified(settings))
        assert image.read_at(0, SIZE) == DATA
