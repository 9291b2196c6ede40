"""Devices outlive the processes that serve them: no I/O error, no wrong byte, no reader left waiting."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

import obdlab
from obdlab.devices.fuse_loop import devices_of
from obdlab.errors import DeviceError
from obdlab.formats import oci
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import open_image
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.writing import Packing
from obdlab.layers.append import AppendUpper
from obdlab.layers.upper import SparseUpper
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.rundir import DeviceRecord
from obdlab.settings.settings import Settings
from obdlab.system import mount
from obdlab.system.processes import Process
from obdlab.traces.replay import reads_of_disk
from obdlab.traces.sets import difference
from tests.devices.contract import MIB, read_direct, write_direct
from tests.registry.server import running_registry
from tests.server.killing import kill, kill_for_good, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
needs_fio = pytest.mark.tools("fio")
FEW_AND_MANY = [4, pytest.param(100, marks=pytest.mark.slow)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    made = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache", read_deadline_s=60.0))
    yield made
    clean_up(made, force=True)
    assert not devices_of(made.run_dir.device("x"))


def pid_of(service: DeviceService, device_id: str = "x") -> int:
    """The server at work: one just started may serve before its keeper has written it down."""

    def recorded() -> DeviceRecord | None:
        return DeviceRecord.load(service.run_dir.device(device_id))

    until(lambda: (record := recorded()) is not None and record.process.alive)
    record = recorded()
    assert record is not None
    return record.pid


def helpers_of(service: DeviceService) -> list[int]:
    record = DeviceRecord.load(service.run_dir.device("x"))
    assert record is not None
    return record.helpers


def golden_config(tmp_path: Path) -> Path:
    path = tmp_path / "golden.json"
    ImageConfig(lowers=tuple(LowerConfig(file=str(GOLDEN / f"layer{n}.obd")) for n in (1, 2))).save(path)
    return path


def writable_config(tmp_path: Path, kind: str, size: int) -> Path:
    data, index = str(tmp_path / "upper.data"), str(tmp_path / "upper.index")
    if kind == "append":
        AppendUpper.create(data, index, size).close()
    else:
        SparseUpper.create(data, size, index_path=index).close()
    path = tmp_path / "writable.json"
    ImageConfig(upper=UpperConfig(index, data)).save(path)
    return path


class Killer:
    """Kills a device's server, or now and then one of its helpers, again and again at random moments."""

    def __init__(self, service: DeviceService, times: int, seed: int = 1) -> None:
        self.killed = 0
        self._service = service
        self._times = times
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(600)
        assert self.killed == self._times

    @property
    def is_done(self) -> bool:
        return self.killed >= self._times

    def _run(self) -> None:
        while not self.is_done:
            until(lambda: Process.of(pid_of(self._service)) is not None)
            time.sleep(self._random.uniform(0.0, 1.5))
            helpers = helpers_of(self._service)
            if helpers and self._random.random() < 0.3:
                try:
                    os.kill(self._random.choice(helpers), signal.SIGKILL)
                except ProcessLookupError:  # it had nothing to do any more
                    continue
            else:
                kill(pid_of(self._service))
            self.killed += 1


def fio(device: Path, killer: Killer, *options: str) -> None:
    """Run fio jobs until the killing is over; each checks what it reads."""
    while True:
        command = ["fio", "--name=job", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--iodepth=16"]
        command += ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--output-format=json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        assert job["error"] == 0
        if killer.is_done:
            return


@needs_fio
@pytest.mark.parametrize("kills", FEW_AND_MANY)
def test_reads_of_a_read_only_device_survive_its_servers(service: DeviceService, tmp_path: Path, kills: int) -> None:
    raw, layer, config = tmp_path / "raw", tmp_path / "layer.obd", tmp_path / "config.json"
    write = ["fio", "--name=job", f"--filename={raw}", "--size=64m", "--rw=write", "--bs=4k", "--verify=crc32c"]
    subprocess.run([*write, "--do_verify=0", "--refill_buffers"], check=True, capture_output=True, cwd=tmp_path)
    import_disk(raw, layer, Packing(), kind="raw")
    ImageConfig(lowers=(LowerConfig(file=str(layer)),)).save(config)
    device = service.attach(config, "x")
    with Killer(service, kills) as killer:
        fio(device.path, killer, "--readonly", "--rw=randread", "--bs=4k", "--size=64m")
    assert service.list()[0].restarts > 0
    assert service.list()[0].path == device.path


@needs_fio
@pytest.mark.parametrize("kind", ["append", pytest.param("sparse", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kills", FEW_AND_MANY)
def test_writes_survive_the_servers(service: DeviceService, tmp_path: Path, kind: str, kills: int) -> None:
    device = service.attach(writable_config(tmp_path, kind, 64 * MIB), "x")
    with Killer(service, kills) as killer:
        options = ("--rw=randwrite", "--bsrange=4k-64k", "--size=64m", "--verify_backlog=256", "--randrepeat=0")
        fio(device.path, killer, *options)


@pytest.mark.parametrize("kind", ["append", pytest.param("sparse", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kills", FEW_AND_MANY)
def test_random_changes_against_a_model(service: DeviceService, tmp_path: Path, kind: str, kills: int) -> None:
    """Acknowledged writes and discards are there whenever the server was killed, without any fsync."""
    device, rng = service.attach(writable_config(tmp_path, kind, 16 * MIB), "x"), random.Random(2)
    model = bytearray(device.size)
    with Killer(service, kills, seed=3) as killer:
        while not killer.is_done:
            length = rng.choice((4096, 8192, 65536, MIB))
            offset = rng.randrange(0, device.size - length + 1, 4096)
            if rng.random() < 0.2:
                subprocess.run(
                    ["blkdiscard", "--offset", str(offset), "--length", str(length), device.path], check=True
                )
                model[offset : offset + length] = bytes(length)
            else:
                data = rng.randbytes(length)
                write_direct(device.path, offset, data)
                model[offset : offset + length] = data
            at = rng.randrange(0, device.size - MIB + 1, 4096)
            assert read_direct(device.path, at, MIB) == model[at : at + MIB]
    assert read_direct(device.path, 0, device.size) == model
    kill_for_good(service.list()[0])
    again = service.attach(tmp_path / "writable.json", "x")
    assert read_direct(again.path, 0, again.size) == model


@pytest.mark.registry
def test_a_server_may_die_while_the_registry_is_down(service: DeviceService, tmp_path: Path) -> None:
    layer = GOLDEN / "layer1.obd"
    digest, size = oci.digest_of(layer.read_bytes()), layer.stat().st_size
    with obdlab.open_stack([layer]) as stack:
        wanted = stack.read_at(0, stack.size // MIB * MIB)
    with running_registry(tmp_path / "registry") as server:
        client = RegistryClient()
        repository = client.repository(Reference.parse(f"{server.host}/golden:1"))
        client.push_blob(repository, digest, size, lambda: layer.open("rb"))
        client.close()
        config = tmp_path / "config.json"
        ImageConfig(repository.blobs_url, lowers=(LowerConfig(digest=digest, size=size),)).save(config)
        device = service.attach(config, "x")
        known = 2 * MIB
        assert read_direct(device.path, 0, known) == wanted[:known]
        os.kill(server.pid, signal.SIGSTOP)
        try:
            kill(device.pid)
            # What is cached is served at once; the rest waits for the registry.
            assert read_direct(device.path, 0, known) == wanted[:known]
            until(lambda: service.list()[0].restarts == 1)
        finally:
            threading.Timer(2.0, os.kill, (server.pid, signal.SIGCONT)).start()
        assert read_direct(device.path, 0, len(wanted)) == wanted


@contextmanager
def reading(device: Path, content: bytes) -> Iterator[list[str]]:
    """Readers that check every byte while the block runs; what goes wrong is in the list."""
    wrong: list[str] = []
    stop = threading.Event()

    def read(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            offset = rng.randrange(0, len(content) - 65536 + 1, 4096)
            try:
                if read_direct(device, offset, 65536) != content[offset : offset + 65536]:
                    wrong.append(f"wrong bytes at {offset}")
            except OSError as error:
                wrong.append(f"{error} at {offset}")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@pytest.fixture
def golden() -> bytes:
    with obdlab.open_stack([GOLDEN / "layer1.obd", GOLDEN / "layer2.obd"]) as stack:
        return stack.read_at(0, stack.size // MIB * MIB)


def test_upgrade_in_place(service: DeviceService, tmp_path: Path, golden: bytes) -> None:
    device = service.attach(golden_config(tmp_path), "x")
    assert not service.upgrade("x")  # runs the installed code
    with reading(device.path, golden):
        for _ in range(3):
            before = service.list()[0]
            assert service.upgrade("x", force=True)
            after = service.list()[0]
            assert after.path == device.path
            assert {after.pid, after.keeper_pid}.isdisjoint({before.pid, before.keeper_pid})
            assert Process.of(before.pid) is None
            assert Process.of(before.keeper_pid) is None
    kill(after.pid)  # the new keeper does what the old one did
    assert read_direct(device.path, 0, MIB) == golden[:MIB]


@pytest.mark.parametrize("kind", ["append", "sparse"])
def test_upgrade_of_a_writable_device(service: DeviceService, tmp_path: Path, kind: str) -> None:
    device = service.attach(writable_config(tmp_path, kind, 4 * MIB), "x")
    data = random.Random(6).randbytes(2 * MIB)
    write_direct(device.path, 0, data)
    with reading(device.path, data):
        assert service.upgrade("x", force=True)
        assert service.upgrade("x", force=True)
    write_direct(device.path, 2 * MIB, data)
    assert read_direct(device.path, 0, 4 * MIB) == data * 2


def test_an_upgrade_that_fails_leaves_the_device_as_it_was(
    service: DeviceService, tmp_path: Path, golden: bytes
) -> None:
    config = golden_config(tmp_path)
    device = service.attach(config, "x")
    text = config.read_text()
    with reading(device.path, golden):
        config.write_text("{}")
        with pytest.raises(DeviceError, match=r"golden\.json has changed since the device was attached"):
            service.upgrade("x", force=True)
        assert service.list()[0].pid == device.pid
        config.write_text(text)
        kill(device.pid)  # its keeper is at work again
    until(lambda: service.list()[0].restarts == 1)


def test_a_server_that_hangs_is_replaced_by_an_upgrade(service: DeviceService, tmp_path: Path, golden: bytes) -> None:
    device = service.attach(golden_config(tmp_path), "x")
    os.kill(device.pid, signal.SIGSTOP)
    with reading(device.path, golden):
        assert service.upgrade("x", force=True)
        assert Process.of(device.pid) is None


def test_without_keeper_the_next_death_is_an_error_and_no_wait(service: DeviceService, tmp_path: Path) -> None:
    device = service.attach(golden_config(tmp_path), "x")
    kill_for_good(device)
    with pytest.raises(OSError) as caught:
        read_direct(device.path, 0, MIB)
    assert caught.value.errno == errno.EIO
    with pytest.raises(DeviceError, match="device x: no such device is being served"):
        service.upgrade("x")


def test_a_dead_device_still_mounted_is_refused_with_the_way_out(service: DeviceService, tmp_path: Path) -> None:
    config, target = golden_config(tmp_path), tmp_path / "a mount"
    target.mkdir()
    device = service.attach(config, "x")
    service.mount(device, target)
    kill_for_good(device)
    try:
        with pytest.raises(DeviceError) as caught:
            service.attach(config, "x")
        message = str(caught.value)
        assert f"device x: its server is dead, but {device.path}: still in use (mounted on {target})" in message
        (told,) = re.findall(r"; run: (.*) and attach again$", message)
        subprocess.run(told, shell=True, check=True, timeout=60)
        assert service.attach(config, "x").alive
    finally:
        if mount.is_mounted(target):
            mount.unmount(target, lazy=True)


def test_servers_that_die_again_and_again_are_given_up(service: DeviceService, tmp_path: Path) -> None:
    device = service.attach(golden_config(tmp_path), "x")

    def kill_at_once() -> None:
        while Process.of(device.keeper_pid) is not None:
            record = DeviceRecord.load(service.run_dir.device("x"))
            if record is not None:
                record.process.signal(signal.SIGKILL)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_at_once)
    killer.start()
    killer.join(120)
    assert not killer.is_alive()
    with pytest.raises(OSError) as caught:
        read_direct(device.path, 0, MIB)
    assert caught.value.errno == errno.EIO
    assert "x: given up after" in service.run_dir.host_log.read_text()
    until(lambda: service.list() == [])


def test_an_image_that_is_gone_is_waited_for_then_given_up(tmp_path: Path) -> None:
    service = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache", read_deadline_s=2.0))
    layer, config = tmp_path / "layer.obd", tmp_path / "config.json"
    shutil.copy(GOLDEN / "layer1.obd", layer)
    ImageConfig(lowers=(LowerConfig(file=str(layer)),)).save(config)
    try:
        device = service.attach(config, "x")
        layer.rename(tmp_path / "away")
        kill(device.pid)
        threading.Timer(0.5, (tmp_path / "away").rename, (layer,)).start()
        assert read_direct(device.path, 0, MIB)
        layer.unlink()
        kill(pid_of(service))
        with pytest.raises(OSError) as caught:
            read_direct(device.path, 0, MIB)
        assert caught.value.errno == errno.EIO
    finally:
        clean_up(service, force=True)


def test_detaching_while_the_server_is_dead(service: DeviceService, tmp_path: Path) -> None:
    for _ in range(3):
        device = service.attach(golden_config(tmp_path), "x")
        os.kill(device.pid, signal.SIGKILL)
        assert service.detach("x")
        assert service.list() == []
        assert Process.of(device.keeper_pid) is None


@needs_fio
def test_a_busy_device_gets_help_and_an_idle_one_lets_it_go(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "cache", server_processes=2)
    service = DeviceService(tmp_path.resolve() / "run", settings)
    try:
        device = service.attach(golden_config(tmp_path), "x")
        assert helpers_of(service) == []
        load = ["fio", "--name=job", f"--filename={device.path}", "--readonly", "--direct=1", "--rw=randread"]
        load += ["--bs=64k", "--ioengine=libaio", "--iodepth=16", "--time_based", "--runtime=200"]
        with subprocess.Popen(load, stdout=subprocess.DEVNULL) as process:
            try:
                until(lambda: helpers_of(service), timeout_s=180)
                until(lambda: (service.run_dir.device("x") / "helper-1.sock").exists())
                (helper,) = helpers_of(service)
                before = service.statistics("x")["reads"]
                until(lambda: service.statistics("x")["reads"] > before)
                assert service.statistics("x")["threads"] >= 2
                kill(helper)
            finally:
                process.terminate()
        assert service.list()[0].pid == device.pid
        until(lambda: helpers_of(service) == [], timeout_s=60)
    finally:
        clean_up(service, force=True)


@needs_fio
def test_all_reads_of_a_busy_device_are_in_its_trace(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "cache", server_processes=2)
    service = DeviceService(tmp_path.resolve() / "run", settings)
    trace = tmp_path / "trace"
    trace.touch()
    config = golden_config(tmp_path)
    replace(ImageConfig.load(config), record_trace_path=str(trace)).save(config)
    try:
        device = service.attach(config, "x")
        load = ["fio", "--name=job", f"--filename={device.path}", "--readonly", "--direct=1", "--rw=randread"]
        load += ["--bs=64k", "--ioengine=libaio", "--iodepth=16", "--time_based", "--runtime=6", "--norandommap=0"]
        subprocess.run(load, stdout=subprocess.DEVNULL, check=True)
        assert helpers_of(service) == []
        assert service.detach("x")
        until(trace.with_name("trace.ok").exists)
    finally:
        clean_up(service, force=True)
    with open_image(ImageConfig.load(config), Settings(), traces=False) as image:
        recorded = Trace.from_bytes(trace.read_bytes())
        whole = Trace.from_reads(reads_of_disk(image, 0, image.size))
        assert difference(whole, recorded) == []
