"""A device service of the test's own, checked for leftovers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from tests.convert.oracle import running_containerd
from tests.registry.server import registry_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.convert.oracle import Containerd

__all__ = ["containerd", "devices", "registry_server", "work_dir"]


@pytest.fixture(scope="package")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    with running_containerd(tmp_path_factory.mktemp("containerd")) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    # No test finds what another has converted, or leaves anything in the user's cache directory.
    monkeypatch.setenv("OBDLAB_CONVERT_DATABASE", "none")


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[DeviceService]:
    service = DeviceService(tmp_path / "run", Settings(cache_dir=tmp_path / "cache"))
    try:
        yield service
    finally:
        service.shutdown(force=True)


@pytest.fixture
def work_dir(tmp_path: Path, devices: DeviceService) -> Iterator[Path]:
    """Where conversions work. After the test it must be empty, and no mount or device left."""
    directory = tmp_path / "work"
    directory.mkdir()
    yield directory
    assert list(directory.iterdir()) == []
    assert devices.list() == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
