"""File systems mounted read-write on a writable device, whose server or whose user is killed again and again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from obdlab.devices import loop
from obdlab.errors import DeviceError
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.live import LiveDevice
from obdlab.server.rundir import DeviceRecord
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests import capabilities
from tests.devices.contract import MIB
from tests.server.killing import until
from tests.server.test_live import new_config
from tests.server.workload import Expected

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
SIZE = 320 * MIB  # the least that mkfs.xfs makes is 300 MiB
MAKE = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"]}
CHECK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}
#: So many kills, then the file system is unmounted and checked.
KILLS_A_CHECK = 10
FEW = [("append", "ext4", "server"), ("sparse", "xfs", "guest")]
ALL = [(kind, fs, victim) for kind in ("append", "sparse") for fs in MAKE for victim in ("server", "guest")]
CASES = [pytest.param(*case, 3, marks=[] if case in FEW else pytest.mark.slow) for case in ALL]
CASES += [pytest.param(*case, 100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]) for case in ALL]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    made = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache"))
    yield made
    clean_up(made, force=True)


@pytest.mark.parametrize(("kind", "filesystem", "victim", "kills"), CASES)
def test_it_is_clean_and_complete_whoever_is_killed(
    service: DeviceService, tmp_path: Path, kind: str, filesystem: str, victim: str, kills: int
) -> None:
    capabilities.require_tools(MAKE[filesystem][0])
    if filesystem not in Path("/proc/filesystems").read_text().split():
        capabilities.missing("kernel", f"the kernel has no {filesystem}")
    config = new_config(tmp_path, kind, size=SIZE)
    device = service.attach(config, "files")
    subprocess.run([*MAKE[filesystem], str(device.path)], check=True, capture_output=True)
    target, expected, rng = tmp_path / "mnt", Expected(seed=kills), random.Random(kills)
    target.mkdir()
    left = kills
    while left:
        with mounted(service, target):
            expected.check(target)
            for _ in range(min(left, KILLS_A_CHECK)):
                work_and_kill(service, target, expected, victim, rng)
                left -= 1
                expected.check(target)
        check(filesystem, device.path)
        collect(service)
    restarts = service.list()[0].restarts
    assert restarts >= kills if victim == "server" else restarts == 0
    # The same by another server, which opens what the first one left.
    service.detach("files")
    device = service.attach(config, "files")
    check(filesystem, device.path)
    with mounted(service, target):
        expected.check(target)
    assert expected.done > kills


def work_and_kill(service: DeviceService, target: Path, expected: Expected, victim: str, rng: random.Random) -> None:
    """Have a guest work; kill it, or first the server under it, at any moment."""
    command = [sys.executable, "-m", "tests.server.workload", str(target), str(expected.seed), str(expected.done)]
    steps = Path(f"{target}.steps")
    before = expected.done
    with steps.open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out) as guest:
        try:
            until(lambda: last_step(steps) > before)
            time.sleep(rng.uniform(0.0, 0.5))
            if victim == "server":
                os.kill(server_of(service), signal.SIGKILL)
                seen = last_step(steps)
                until(lambda: last_step(steps) > seen + 1)  # it goes on
            assert guest.poll() is None
        finally:
            guest.kill()
    expected.advance(last_step(steps))


def check(filesystem: str, device: Path) -> None:
    done = subprocess.run([*CHECK[filesystem], str(device)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def server_of(service: DeviceService) -> int:
    def running() -> DeviceRecord | None:
        record = DeviceRecord.load(service.run_dir.device("files"))
        return record if record is not None and record.process.alive else None

    until(running)
    record = running()
    assert record is not None
    return record.pid


def last_step(steps: Path) -> int:
    lines = steps.read_bytes().split(b"\n")
    return int(lines[-2]) if len(lines) > 1 else 0


# Also while the server has just begun; a layer that is not collected has all its past.
def collect(service: DeviceService) -> None:
    with suppress(DeviceError):
        LiveDevice(service, "files").collect()


@contextmanager
def mounted(service: DeviceService, target: Path) -> Iterator[None]:
    (device,) = service.list()
    service.mount(device, target, read_only=False)
    try:
        yield
    finally:
        until(lambda: is_unmounted(target), timeout_s=60)
        until(lambda: not loop.in_use(device.path), timeout_s=60)  # others here copy mounts for a moment


# Those who were killed may still be about to end.
def is_unmounted(target: Path) -> bool:
    try:
        return mount.unmount(target)
    except DeviceError:
        return False
