"""Two devices of one run directory, one of local layers and one of a real registry's, and what an exporter says."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from obdlab.devices.fuse_loop import devices_of
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.server.cleanup import clean_up
from obdlab.server.client import AttachedDevice, DeviceService
from obdlab.settings.settings import Settings
from tests.image.test_open_remote import EXT4, push
from tests.registry.server import RegistryServer

KIB = 1 << 10
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Devices:
    """Attached devices ``local`` and ``remote``."""

    def __init__(self, service: DeviceService, directory: Path, registry: RegistryServer) -> None:
        self.service = service
        self.directory = directory
        configs = {
            "local": ImageConfig(lowers=tuple(LowerConfig(file=str(path)) for path in EXT4)),
            "remote": push(registry, "exporter/image", EXT4),
        }
        for name, config in configs.items():
            config.save(directory / f"{name}.json")

    def attach(self, name: str) -> AttachedDevice:
        return self.service.attach(self.directory / f"{name}.json", name)

    @staticmethod
    def read(device: AttachedDevice, offset: int, length: int) -> bytes:
        """Read past the page cache."""
        fd = os.open(device.path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, length) as buffer:
                assert os.preadv(fd, [buffer], offset) == length
                return buffer[:]
        finally:
            os.close(fd)


@contextmanager
def two_devices(directory: Path, registry: RegistryServer, **settings: object) -> Iterator[Devices]:
    root = directory.resolve()
    made = Settings(cache_dir=root / "cache", device_readahead_kib=0, **settings)  # type: ignore[arg-type]
    service = DeviceService(root / "run", made)
    try:
        yield Devices(service, root, registry)
    finally:
        clean_up(service, force=True)
        until(lambda: not any(devices_of(root / "run" / "devices" / name) for name in ("local", "remote")))


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


def samples_of(metrics: Iterator[Metric] | list[Metric]) -> Samples:
    found: Samples = {}
    for metric in metrics:
        found |= {(sample.name, frozenset(sample.labels.items())): sample.value for sample in metric.samples}
    return found


def parsed(text: str) -> Samples:
    return samples_of(list(text_string_to_metric_families(text)))


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]
