"""Background download of a whole image, from a real registry."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from obdlab.cache.admin import entries
from obdlab.cache.space import CacheSpace
from obdlab.image.open import open_image
from obdlab.settings.settings import Settings, SettingsError
from tests.image.test_open_remote import LAYERS, MERGED_SHA256, push, sha256_of
from tests.image.test_open_remote import settings as settings  # a fixture
from tests.registry.server import RegistryServer

pytestmark = pytest.mark.registry


def at_once(settings: Settings) -> Settings:
    return replace(settings, download_enabled=True, download_delay_s=0, download_delay_extra_s=0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)


def verified(settings: Settings) -> list[bool]:
    return [entry.verified for entry in entries(CacheSpace(settings.cache_dir))]


def test_all_layers_come_and_are_verified(registry_server: RegistryServer, settings: Settings) -> None:
    config = push(registry_server, "download/image", LAYERS)
    with open_image(config, at_once(settings)) as image:
        wait_until(lambda: verified(settings) == [True] * len(LAYERS))
        requests = image.statistics()["requests"]
        assert sha256_of(image) == MERGED_SHA256
        assert image.statistics()["requests"] == requests
    # The registry is not needed any more.
    config = replace(config, repo_blob_url=config.repo_blob_url.replace("download/image", "download/gone"))
    with open_image(config, settings) as image:
        assert sha256_of(image) == MERGED_SHA256
        assert image.statistics()["requests"] == 0


def test_not_unless_asked_for(registry_server: RegistryServer, settings: Settings) -> None:
    config = push(registry_server, "download/off", LAYERS)
    off = replace(at_once(settings), download_enabled=False)
    with open_image(config, off) as image:
        time.sleep(0.2)
        assert image.statistics()["background_bytes"] == 0


def test_not_what_is_larger_than_the_cache(
    registry_server: RegistryServer, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    config = push(registry_server, "download/large", LAYERS)
    small = replace(at_once(settings), cache_quota=sum(lower.size for lower in config.lowers) - 1)
    with caplog.at_level(logging.WARNING), open_image(config, small) as image:
        assert sha256_of(image) == MERGED_SHA256
        assert image.statistics()["background_bytes"] == 0
    assert "not downloaded, larger than the cache" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [{"download_tries": 0}, {"download_delay_s": -1}, {"download_bytes_per_s": -1}, {"cache_quota": -1}],
)
def test_settings_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]
    assert Settings.from_json(Settings(cache_quota=5).to_json()).cache_quota == 5
