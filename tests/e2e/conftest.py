"""One image of busybox with a large file, converted once for the run."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from tests import capabilities
from tests.e2e.images import busybox_layer, file_layer, push_converted
from tests.registry.server import registry_server
from tests.snapshotter import imagefiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.registry.server import RegistryServer

__all__ = ["registry_server"]

#: What /big of the image holds: too much to come along with anything else that is read.
BIG = random.Random(7).randbytes(6 << 20)


@pytest.fixture(scope="session")
def layers() -> list[bytes]:
    capabilities.require("containerd")
    imagefiles.require_busybox()
    return [busybox_layer({"etc/issue": b"below\n"}), file_layer({"etc/issue": b"on top\n", "big": BIG})]


@pytest.fixture(scope="session")
def image(registry_server: RegistryServer, layers: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A converted image of two layers."""
    return push_converted(registry_server.host, "e2e/busybox", layers, tmp_path_factory.mktemp("convert"))


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def blob_bytes(server: RegistryServer) -> int:
    """What the registry has given out of blobs so far."""
    return sum(int(entry["written"]) for entry in server.requests() if "/blobs/" in entry["uri"])


def file_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
