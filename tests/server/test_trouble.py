"""Bad sources under a mounted image: readers get an error within the deadline and never a wrong byte."""

from __future__ import annotations

import errno
import io
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import obdlab
from obdlab.formats import oci
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests.devices.contract import MIB, read_direct
from tests.registry.server import running_registry
from tests.server.killing import until

pytestmark = pytest.mark.kernel

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
DEADLINE_S = 2.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    settings = Settings(cache_dir=tmp_path / "cache", read_deadline_s=DEADLINE_S, readahead_max=0)
    made = DeviceService(tmp_path.resolve() / "run", settings)
    yield made
    clean_up(made, force=True)


def layer_content() -> bytes:
    with obdlab.open_stack([GOLDEN / "layer1.obd"]) as stack:
        return stack.read_at(0, stack.size // 64)


def test_a_flipped_bit_gives_eio_and_is_named(service: DeviceService, tmp_path: Path) -> None:
    bad = tmp_path / "layer1.obd"
    data = bytearray((GOLDEN / "layer1.obd").read_bytes())
    for position in range(len(data) // 4, len(data) // 2, 50_000):  # inside the blocks of compressed data
        data[position] ^= 0x10
    bad.write_bytes(data)
    config = tmp_path / "config.v1.json"
    ImageConfig(lowers=(LowerConfig(file=str(bad)),)).save(config)
    device, good = service.attach(config, "x"), layer_content()
    failed = wrong = 0
    for offset in range(0, len(good) // MIB * MIB, 65536):
        try:
            if read_direct(device.path, offset, 65536) != good[offset : offset + 65536]:
                wrong += 1
        except OSError as error:
            assert error.errno == errno.EIO
            failed += 1
    assert failed > 0
    assert wrong == 0
    said = service.last_error("x")
    assert "layer1.obd" in said
    assert "offset" in said


@pytest.mark.registry
def test_a_registry_that_stops_answering(service: DeviceService, tmp_path: Path) -> None:
    layer = GOLDEN / "layer1.obd"
    digest, size = oci.digest_of(layer.read_bytes()), layer.stat().st_size
    with running_registry(tmp_path / "registry") as server:
        client = RegistryClient()
        repository = client.repository(Reference.parse(f"{server.host}/golden:1"))
        client.push_blob(repository, digest, size, partial(layer.open, "rb"))
        client.close()
        config = tmp_path / "config.v1.json"
        ImageConfig(repository.blobs_url, lowers=(LowerConfig(digest=digest, size=size),)).save(config)
        device = service.attach(config, "x")
        target = tmp_path / "mnt"
        target.mkdir()
        service.mount(device, target)
        os.kill(server.pid, signal.SIGSTOP)  # accepts connections, says nothing
        try:
            started = time.monotonic()
            with pytest.raises(OSError) as caught, (target / "big").open("rb") as file:
                file.read()
            assert caught.value.errno == errno.EIO
            # The kernel asks again for single pages, each of which has the deadline.
            assert time.monotonic() - started < 20 * DEADLINE_S + 60
            assert sorted(path.name for path in target.iterdir())[:2] == ["abs", "big"]
            assert digest[:20] in service.last_error("x")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        # That the registry could not deliver is remembered for 2 s.
        until(lambda: _size_read(target / "big") == 1200000)
        mount.unmount(target)


def _size_read(path: Path) -> int:
    try:
        return len(path.read_bytes())
    except OSError:
        return -1


@pytest.mark.registry
def test_a_blob_the_registry_does_not_have(service: DeviceService, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as server:
        client = RegistryClient()
        repository = client.repository(Reference.parse(f"{server.host}/golden:1"))
        client.push_blob(repository, oci.digest_of(b"x"), 1, lambda: io.BytesIO(b"x"))
        client.close()
        lower = LowerConfig(digest="sha256:" + "0" * 64, size=4096)
        config = tmp_path / "config.v1.json"
        ImageConfig(repository.blobs_url, lowers=(lower,)).save(config)
        with pytest.raises(obdlab.ObdlabError, match=r"sha256:0{12,}.*404"):
            service.attach(config, "x")
        assert service.list() == []
