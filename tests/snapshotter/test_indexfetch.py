"""Layers that are pulled are handed on, together where they come fast; nothing that goes wrong comes back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.snapshotter.indexfetch import Priming
from tests.containerd_host import containerd_with_obdlab
from tests.registry.server import RegistryServer, registry_server
from tests.snapshotter.test_lazy_images import push_golden

__all__ = ["registry_server"]

WAIT_S = 60.0


class Devices:
    """Takes images, the first one as soon as ``go_on`` is set; raises where ``refuse`` says so."""

    def __init__(self) -> None:
        self.images: list[ImageConfig] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.refuse = False

    def prime(self, image: ImageConfig) -> None:
        self.begun.set()
        assert self.go_on.wait(WAIT_S)
        self.images.append(image)
        if self.refuse:
            raise DeviceError("no host")


def layer(number: int) -> LowerConfig:
    return LowerConfig(digest=f"sha256:{number:064}", size=4096)


def test_what_comes_meanwhile_goes_together() -> None:
    devices = Devices()
    priming = Priming(devices)  # type: ignore[arg-type]
    priming.add("http://a/v2/x/blobs", layer(0))
    assert devices.begun.wait(WAIT_S)
    for number in (1, 2):
        priming.add("http://a/v2/x/blobs", layer(number))
    priming.add("http://a/v2/y/blobs", layer(3))
    devices.go_on.set()
    assert priming.wait(WAIT_S)
    assert [(image.repo_blob_url[-7:-6], image.lowers) for image in devices.images] == [
        ("x", (layer(0),)),
        ("x", (layer(1), layer(2))),
        ("y", (layer(3),)),
    ]


def test_failures_are_nobodys() -> None:
    devices = Devices()
    devices.refuse = True
    devices.go_on.set()
    priming = Priming(devices)  # type: ignore[arg-type]
    for number in range(3):
        priming.add("http://a/v2/x/blobs", layer(number))
        assert priming.wait(WAIT_S)
    assert len(devices.images) == 3


def test_no_more_than_can_wait() -> None:
    devices = Devices()
    priming = Priming(devices)  # type: ignore[arg-type]
    priming.add("http://a/v2/x/blobs", layer(0))
    assert devices.begun.wait(WAIT_S)
    for number in range(5000):
        priming.add("http://a/v2/x/blobs", layer(number))
    devices.go_on.set()
    assert priming.wait(WAIT_S)
    assert sum(len(image.lowers) for image in devices.images) == 1025


@pytest.mark.containerd
def test_its_indexes_come_with_the_pull(registry_server: RegistryServer, tmp_path: Path) -> None:
    name = push_golden(registry_server, "indexes")
    with containerd_with_obdlab(tmp_path) as own:
        own.rpull(name)
        cache_dir = own.snapshotter.devices.settings.cache_dir
        deadline = time.monotonic() + WAIT_S
        while len(list(cache_dir.rglob("data"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert own.snapshotter.devices.list() == []
