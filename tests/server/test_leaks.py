"""Devices come and go without leaving anything, many at a time, and a busy one says who holds it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.devices import loop
from obdlab.devices.fuse_loop import directories_below
from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.rundir import DeviceRecord
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests.devices.contract import MIB, read_direct
from tests.server.killing import until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    made = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache"))
    yield made
    clean_up(made, force=True)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.v1.json"
    ImageConfig(lowers=tuple(LowerConfig(file=str(GOLDEN / f"layer{n}.obd")) for n in (1, 2))).save(path)
    return path


def processes_of(service: DeviceService) -> list[str]:
    """The host and all it has forked are known by the run directory in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(service.run_dir.path) in (process / "cmdline").read_bytes():
                found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
        except OSError:
            continue
    return found


@pytest.mark.parametrize("rounds", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_rounds_leave_nothing(service: DeviceService, config: Path, tmp_path: Path, rounds: int) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    service.start_host()
    (host,) = processes_of(service)
    host_fds = Path(f"/proc/{host.split()[0]}/fd")
    before = least_open(host_fds)
    for number in range(rounds):
        device = service.attach(config, f"d{number % 7}")
        service.mount(device, target)
        assert (target / "big").stat().st_size == 1200000
        until(lambda: unmounted(target))
        until(lambda name=device.device_id: detached(service, name))  # type: ignore[misc]
    assert processes_of(service) == [host]
    assert list(service.run_dir.devices.iterdir()) == []
    assert directories_below(service.run_dir.devices) == set()
    assert least_open(host_fds) == before


def least_open(host_fds: Path) -> tuple[int, ...]:
    """Descriptors of the host and of this process, and mounts: without what is there for a moment only."""
    seen = []
    for _ in range(20):
        seen.append((len(os.listdir(host_fds)), len(os.listdir("/proc/self/fd")), len(mount.mounts())))
        time.sleep(0.02)
    return tuple(min(counts) for counts in zip(*seen, strict=True))


# Other tests on this machine copy mounts for a moment.
def detached(service: DeviceService, device_id: str) -> bool:
    try:
        service.detach(device_id)
    except DeviceError:
        return False
    return True


def unmounted(target: Path) -> bool:
    try:
        mount.unmount(target)
    except DeviceError:
        return False
    return True


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_many_devices_at_once(service: DeviceService, config: Path, count: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        devices = list(pool.map(lambda number: service.attach(config, f"d{number}"), range(count)))
        assert len({device.path for device in devices}) == count
        assert len(set(pool.map(lambda device: read_direct(device.path, 0, MIB), devices))) == 1
        pss = [pss_kib(pid) for device in devices for pid in (device.keeper_pid, device.pid)]
        assert sum(pss) / count < 30 * 1024
        assert all(pool.map(lambda device: service.detach(device.device_id), devices))
    assert service.list() == []
    assert len(processes_of(service)) == 1


def pss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def test_an_idle_device_takes_no_processor_time(service: DeviceService, config: Path) -> None:
    device = service.attach(config, "x")
    pids = (device.keeper_pid, device.pid)
    # One read after the other: such a server looks for the next instead of sleeping, for a moment.
    subprocess.run(
        ["dd", f"if={device.path}", "of=/dev/null", "bs=4k", "count=4000", "iflag=direct"],
        check=True,
        capture_output=True,
    )

    def are_still() -> bool:
        before = [work_of(pid) for pid in pids]
        subprocess.run(["sleep", "2"], check=True)
        # Reading /proc wakes nobody; a thread that ends after its last work may.
        return all(
            switches - old_switches <= 2 and ran_s - old_ran_s < 0.1
            for (switches, ran_s), (old_switches, old_ran_s) in zip(map(work_of, pids), before, strict=True)
        )

    # On a loaded host what follows an attach (others look at the new disk) takes a while.
    assert any(are_still() for _ in range(5))


def work_of(pid: int) -> tuple[int, float]:
    """How often a process' threads went to sleep, and how long they have run."""
    switches, ran_ns = 0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        ran_ns += int((task / "schedstat").read_text().split()[0])
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                switches += int(line.split()[1])
    return switches, ran_ns / 1e9


def test_a_busy_device_names_its_users(service: DeviceService, config: Path, tmp_path: Path) -> None:
    device = service.attach(config, "x")
    target = tmp_path / "mnt"
    target.mkdir()
    service.mount(device, target)
    with (target / "big").open("rb"):
        with pytest.raises(DeviceError, match=rf"{target}: busy, held by .*process {os.getpid()} \("):
            mount.unmount(target)
        with pytest.raises(DeviceError, match=f"mounted on {target}"):
            service.detach("x")
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        mount.unmount(target)
        with pytest.raises(DeviceError, match=rf"another mount namespace.*process {other.pid} \(cat\)"):
            service.detach("x")
    finally:
        other.communicate(timeout=60)
    until(lambda: detached(service, "x"))


def host_pid(service: DeviceService) -> int:
    pid: int = json.loads((service.run_dir.path / "host.pid").read_text())["pid"]
    return pid


def test_a_host_out_of_descriptors_refuses_and_goes_on(service: DeviceService, config: Path) -> None:
    service.attach(config, "first")  # a host that is still starting would not get over it
    assert service.detach("first")
    pid = host_pid(service)
    subprocess.run(["prlimit", f"--pid={pid}", "--nofile=3:4096"], check=True)
    with pytest.raises(DeviceError), ThreadPoolExecutor(1) as pool:
        pool.submit(service.attach, config, "x", timeout_s=1.0).result()
    subprocess.run(["prlimit", f"--pid={pid}", "--nofile=4096:4096"], check=True)
    assert service.attach(config, "x").alive
    assert host_pid(service) == pid


def test_the_record_tells_who_serves(service: DeviceService, config: Path) -> None:
    device = service.attach(config, "x")
    record = DeviceRecord.load(service.run_dir.device("x"))
    assert record is not None
    assert (record.pid, record.keeper_pid, record.restarts) == (device.pid, device.keeper_pid, 0)
    assert loop.label_of(device.path).endswith(":x")
    assert Path(f"/proc/{device.keeper_pid}/comm").read_text() == "keep:x\n"
    assert len(os.listdir(f"/proc/{device.keeper_pid}/task")) == 1
