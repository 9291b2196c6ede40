"""File systems mounted read-write on a writable device, whose users are killed in the middle of their writes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from obdlab.devices import mount
from obdlab.errors import DeviceError
from obdlab.image.settings import Settings
from obdlab.service.cleanup import clean_up
from obdlab.service.client import DeviceService
from obdlab.service.live import LiveDevice
from tests.devices.contract import MIB
from tests.layers.uppers import KINDS
from tests.service.test_live import new_config

pytestmark = pytest.mark.kernel

SIZE = 320 * MIB  # the least that mkfs.xfs makes is 300 MiB
MAKE = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"]}
CHECK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    made = DeviceService(tmp_path.resolve() / "run", Settings(cache_dir=tmp_path / "cache"))
    yield made
    clean_up(made, force=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filesystem", MAKE)
def test_a_killed_user_leaves_a_clean_file_system(
    service: DeviceService, tmp_path: Path, kind: str, filesystem: str
) -> None:
    if filesystem not in Path("/proc/filesystems").read_text().split():
        pytest.skip(f"the kernel has no {filesystem}")
    config = new_config(tmp_path, kind, size=SIZE)
    device = service.attach(config, "files")
    subprocess.run([*MAKE[filesystem], str(device.path)], check=True, capture_output=True)
    target = tmp_path / "mnt"
    target.mkdir()
    service.mount(device, target, read_only=False)
    try:
        use_and_be_killed(service, target)
    finally:
        unmount(target)
    subprocess.run([*CHECK[filesystem], str(device.path)], check=True, capture_output=True)
    # The same by another server, which opens what the first one left.
    service.detach("files")
    device = service.attach(config, "files")
    subprocess.run([*CHECK[filesystem], str(device.path)], check=True, capture_output=True)
    service.mount(device, target, read_only=False)
    try:
        assert (target / "kept").read_bytes() == b"before " * 100_000
    finally:
        unmount(target)


def use_and_be_killed(service: DeviceService, target: Path) -> None:
    kept = target / "kept"
    kept.write_bytes(b"before " * 100_000)
    subprocess.run(["sync", "-f", str(kept)], check=True)
    script = "i=0; while :; do i=$((i+1)); head -c 300000 /dev/zero | tr '\\0' x > f$((i%40)); rm -f f$((i%7)); done"
    user = subprocess.Popen(["sh", "-c", script], cwd=target, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not (target / "f30").exists() and time.monotonic() < until:
            time.sleep(0.01)
        LiveDevice(service, "files").flush()
    finally:
        os.killpg(user.pid, signal.SIGKILL)
        user.wait()
    assert (target / "f30").exists()


def unmount(target: Path) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            assert mount.unmount(target)
        except DeviceError:  # those who were killed are still about to end
            assert time.monotonic() < until
            time.sleep(0.05)
        else:
            return
