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
from tests.server.killing import until
from tests.snapshotter.test_lazy_images import push_golden

__all__ = ["registry_server"]

WAIT_S = 60.0


class Devices:
    """Takes images, the first one as soon as ``go_on`` is set; raises where ``refuse`` says so."""

    def __init__(self) -> None:
        self.images: list[ImageConfig] = []
        self.starts: list[ImageConfig] = []
        self.begun, self.go_on, self.start_on = threading.Event(), threading.Event(), threading.Event()
        self.start_on.set()
        self.refuse = False

    def prime(self, image: ImageConfig, *, start: bool = False) -> None:
        if start:
            self.starts.append(image)
            assert self.start_on.wait(WAIT_S)
        else:
            self.begun.set()
            assert self.go_on.wait(WAIT_S)
            self.images.append(image)
        if self.refuse:
            raise DeviceError("no host")


def image(repository: str, *numbers: int, acceleration: bool = False) -> ImageConfig:
    lowers = tuple(
        LowerConfig(digest=f"sha256:{number:064}", size=4096, dir=f"/{repository}/{number}") for number in numbers
    )
    url = f"http://a/v2/{repository}/blobs"
    return ImageConfig(repo_blob_url=url, lowers=lowers, acceleration_layer=acceleration)


def asked(devices: Devices) -> list[tuple[str, tuple[str, ...]]]:
    return [(each.repo_blob_url[-7:-6], tuple(lower.digest[-2:] for lower in each.lowers)) for each in devices.images]


def test_layers_that_come_meanwhile_go_together() -> None:
    devices = Devices()
    priming = Priming(devices)  # type: ignore[arg-type]
    priming.add(image("x", 0))
    assert devices.begun.wait(WAIT_S)
    for made in (image("x", 0, 1), image("x", 0, 1, 2), image("x", 0, 1, 2, 3, acceleration=True), image("y", 3)):
        priming.add(made)
    devices.go_on.set()
    assert priming.wait(WAIT_S)
    assert asked(devices) == [("x", ("00",)), ("x", ("01", "02")), ("y", ("03",))]


def test_the_start_of_a_whole_image_is_fetched_once_its_layers_are_there() -> None:
    devices = Devices()
    priming = Priming(devices)  # type: ignore[arg-type]
    priming.add(image("x", 0))
    assert devices.begun.wait(WAIT_S)
    whole = (image("x", 0, 1, 2, acceleration=True), image("x", 0, 1, 5), image("y", 3))
    for made in (image("x", 0, 1), *whole):
        priming.add(made)
    assert devices.starts == []
    devices.go_on.set()
    assert priming.wait(WAIT_S)
    assert sorted(devices.starts, key=str) == sorted(whole, key=str)


def test_without_a_thread_the_next_pull_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices()
    devices.go_on.set()
    priming = Priming(devices)  # type: ignore[arg-type]
    start, refused = threading.Thread.start, [True, False, True]

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("prime") and refused and refused.pop(0):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr("threading.Thread.start", refuse)
    priming.add(image("x", 0))
    assert priming.wait(WAIT_S)
    assert devices.images == []
    priming.add(image("y", 1))
    assert priming.wait(WAIT_S)
    assert asked(devices) == [("x", ("00",)), ("y", ("01",))]
    assert len(devices.starts) == 1  # the other one got no thread


def test_an_image_that_is_started_is_left_to_its_server() -> None:
    devices = Devices()
    devices.go_on.set()
    priming = Priming(devices, lambda image: image.lowers[-1].digest.endswith("1"))  # type: ignore[arg-type]
    for made in (image("x", 0, 1), image("y", 2)):
        priming.add(made)
    assert priming.wait(WAIT_S)
    assert devices.starts == [image("y", 2)]
    assert len(asked(devices)) >= 1


def test_a_slow_start_delays_no_other_image() -> None:
    devices = Devices()
    devices.go_on.set()
    devices.start_on.clear()
    priming = Priming(devices)  # type: ignore[arg-type]
    for number in range(9):
        before = len(devices.images)
        priming.add(image("x", number))
        until(lambda before=before: len(devices.images) > before, timeout_s=WAIT_S)
        until(lambda number=number: len(devices.starts) >= min(4, number + 1), timeout_s=WAIT_S)
    assert len(devices.starts) == 4
    assert not priming.wait(0.05)
    devices.start_on.set()
    assert priming.wait(WAIT_S)


def test_failures_are_nobodys() -> None:
    devices = Devices()
    devices.refuse = True
    devices.go_on.set()
    priming = Priming(devices)  # type: ignore[arg-type]
    for number in range(6):
        priming.add(image("x", number))
        assert priming.wait(WAIT_S)
    assert len(devices.images) == len(devices.starts) == 6


def test_no_more_than_can_wait() -> None:
    devices = Devices()
    priming = Priming(devices)  # type: ignore[arg-type]
    priming.add(image("x", 0))
    assert devices.begun.wait(WAIT_S)
    for number in range(5000):
        priming.add(image("x", number))
    devices.go_on.set()
    assert priming.wait(WAIT_S)
    assert sum(len(each.lowers) for each in devices.images) == 1025


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
