"""The device host as it is started on demand, with real images."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import obdlab
from obdlab.devices.fuse_loop import devices_of
from obdlab.errors import DeviceError, caused_by
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.open import ImageOpenError
from obdlab.registry.errors import RegistryError
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from tests.devices.contract import MIB, read_direct

pytestmark = pytest.mark.kernel

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
LAYERS = [GOLDEN / "layer1.obd", GOLDEN / "layer2.obd"]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    made = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache"))
    yield made
    clean_up(made, force=True)
    assert not any(devices_of(tmp_path / "run" / "devices" / name) for name in ("1", "2", "x"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.v1.json"
    ImageConfig(lowers=tuple(LowerConfig(file=str(layer)) for layer in LAYERS)).save(path)
    return path


def host_pid(service: DeviceService) -> int:
    return int(json.loads((service.run_dir.path / "host.pid").read_text())["pid"])


def test_host_is_started_once_on_demand(service: DeviceService, config: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        devices = list(pool.map(lambda name: service.attach(config, name), ("1", "2", "1", "2")))
    assert len(set(devices)) == 2
    with obdlab.open_stack(LAYERS) as stack:
        assert all(read_direct(device.path, 0, 4 * MIB) == stack.read_at(0, 4 * MIB) for device in devices)
    assert os.getsid(host_pid(service)) != os.getsid(0)
    assert os.getsid(devices[0].pid) == devices[0].pid


def test_host_is_alone_in_its_process(service: DeviceService, config: Path) -> None:
    # A fork copies the forking thread only: another thread's locks would stay locked for good in the child.
    service.attach(config, "1")
    assert len(os.listdir(f"/proc/{host_pid(service)}/task")) == 1


def test_a_host_whose_devices_die_together_goes_on(service: DeviceService, config: Path) -> None:
    for round_number in range(4):
        devices = [service.attach(config, f"{round_number}-{number}") for number in range(8)]
        for device in devices:
            for pid in (device.keeper_pid, device.pid):
                os.kill(pid, signal.SIGKILL)
        assert service.attach(config, "x", timeout_s=30).alive
        for device in devices:
            service.detach(device.device_id, force=True)
        service.detach("x")


def test_servers_take_little_memory(service: DeviceService, config: Path) -> None:
    device = service.attach(config, "1")
    lines = Path(f"/proc/{device.pid}/smaps_rollup").read_text().splitlines()
    (pss_kib,) = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    assert pss_kib < 60 * 1024


def test_a_killed_host_is_replaced(service: DeviceService, config: Path) -> None:
    first = service.attach(config, "1")
    killed = host_pid(service)
    os.kill(killed, signal.SIGKILL)
    assert service.attach(config, "1") == first
    assert host_pid(service) != killed
    assert read_direct(first.path, 0, MIB)


def test_a_host_of_older_code_is_replaced(service: DeviceService, config: Path) -> None:
    # An added file is a change as well; a new one, so that the checkout's own are left alone.
    first, stale = service.attach(config, "1"), host_pid(service)
    probe = Path(obdlab.__file__).parent / f"_probe_{os.getpid()}.py"
    probe.write_text("")
    try:
        assert service.attach(config, "2").alive
        assert host_pid(service) != stale
        assert service.list()[0] == first
    finally:
        probe.unlink()


def test_host_that_cannot_start_says_why(tmp_path: Path, config: Path) -> None:
    place = tmp_path / "a file"
    place.write_text("")
    with pytest.raises(DeviceError, match=r"a file.*cannot make the run directory"):
        DeviceService(place, Settings()).attach(config)


def test_a_layer_that_is_not_there_is_named(service: DeviceService, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    ImageConfig(lowers=(LowerConfig(file=str(LAYERS[0])), LowerConfig(file="/no/such/layer.obd"))).save(path)
    started = time.monotonic()
    with pytest.raises(ImageOpenError, match=r"bad\.json: .*/no/such/layer\.obd"):
        service.attach(path, "x")
    assert time.monotonic() - started < 60
    assert service.list() == []


def test_an_unreachable_registry_is_named(service: DeviceService, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    lower = LowerConfig(digest="sha256:" + "ab" * 32, size=4096)
    ImageConfig(repo_blob_url="http://127.0.0.1:1/v2/some/image/blobs", lowers=(lower,)).save(path)
    settings = Settings(cache_dir=tmp_path / "cache", open_deadline_s=2.0)
    with pytest.raises(ImageOpenError, match=r"127\.0\.0\.1:1") as caught:
        DeviceService(service.run_dir.path, settings).attach(path, "x")
    assert caused_by(caught.value, RegistryError)
    assert service.list() == []
