"""What killed clients, hosts and servers leave, and cleaning up after them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.devices import loop
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount
from obdlab.system.processes import Process
from tests.devices.contract import MIB, read_direct
from tests.server.bed import Bed, bed, start_host
from tests.server.hosting import content_of
from tests.server.killing import kill_for_good, until

__all__ = ["bed"]

pytestmark = pytest.mark.kernel

CLIENT = """
import sys, time
from pathlib import Path
from obdlab.settings.settings import Settings
from obdlab.server.client import DeviceService
print(DeviceService(Path(sys.argv[1]), Settings()).attach(Path(sys.argv[2]), "x").path, flush=True)
time.sleep(60)
"""


def test_killing_client_and_host_leaves_io_alive(bed: Bed) -> None:
    config = bed.config("a", seed=4)
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(bed.run_dir), str(config)], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    path = Path(client.stdout.readline().strip())
    client.kill()
    client.communicate(timeout=60)
    content = content_of({"seed": 4})
    assert read_direct(path, 0, MIB) == content
    bed.kill_host()
    assert read_direct(path, 0, MIB) == content
    bed.host = start_host(bed.run_dir)
    device = bed.service.attach(config, "x")
    assert device.path == path
    assert bed.service.detach("x")


def test_a_client_killed_in_the_middle_of_an_attach(bed: Bed) -> None:
    config = bed.config("a", sleep_s=1)
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(bed.run_dir), str(config)], stdout=subprocess.PIPE)
    until((bed.run_dir / "devices" / "x").exists)
    client.kill()
    client.communicate(timeout=60)
    assert bed.service.attach(config, "x").size == MIB


def test_nothing_stays_of_an_attach_whose_client_went_away(bed: Bed) -> None:
    config = bed.config("a", sleep_s=1)
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(bed.run_dir), str(config)], stdout=subprocess.PIPE)
    directory = bed.run_dir / "devices" / "x"
    until(directory.exists)
    client.kill()
    client.communicate(timeout=60)
    until(lambda: not directory.exists())
    assert bed.leftovers() == []


def test_a_device_with_neither_keeper_nor_server_gives_eio_and_is_replaced(bed: Bed) -> None:
    config = bed.config("a", seed=5)
    device = bed.service.attach(config, "a")
    kill_for_good(device)
    with pytest.raises(OSError) as caught:
        read_direct(device.path, 0, 4096)
    assert caught.value.errno == errno.EIO
    again = bed.service.attach(config, "a")
    assert again.pid != device.pid
    assert read_direct(again.path, 0, MIB) == content_of({"seed": 5})


def test_what_killed_processes_left_is_swept_by_list(bed: Bed) -> None:
    device = bed.service.attach(bed.config("a"), "a")
    kill_for_good(device)
    assert bed.service.list() == []
    assert bed.leftovers() == []


def test_a_loop_device_taken_away_is_replaced(bed: Bed) -> None:
    config = bed.config("a", seed=6)
    device = bed.service.attach(config, "a")
    loop.detach(device.path, label=loop.label_of(device.path))
    again = bed.service.attach(config, "a")
    assert again.path.read_bytes() == content_of({"seed": 6})
    assert Process.of(device.pid) is None


def test_cleanup_after_everything_was_killed(bed: Bed, tmp_path: Path) -> None:
    device = bed.service.attach(bed.config("rw", writable=True, size=16 * MIB), "rw")
    bed.service.attach(bed.config("other"), "other")
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True, capture_output=True)
    target = tmp_path / "mnt"
    target.mkdir()
    bed.service.mount(device, target)
    bed.kill_host()
    kill_for_good(device)
    (dead,) = [each for each in bed.service.list() if not each.alive]
    assert dead.device_id == "rw"
    report = clean_up(bed.service)
    assert report.in_use == []
    assert f"mount {target}" in report.removed
    assert bed.leftovers() == []
    assert not mount.is_mounted(target)
    assert clean_up(bed.service).removed == []


def test_cleanup_leaves_and_names_what_is_in_use(bed: Bed, tmp_path: Path) -> None:
    device = bed.service.attach(bed.config("rw", writable=True, size=16 * MIB), "rw")
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True, capture_output=True)
    target = tmp_path / "mnt"
    target.mkdir()
    bed.service.mount(device, target)
    fd = os.open(target, os.O_RDONLY)
    try:
        report = clean_up(bed.service)
        assert any(f"process {os.getpid()}" in line for line in report.in_use)
        assert mount.is_mounted(target)
        assert (target / "lost+found").is_dir()
        report = clean_up(bed.service, force=True)
        assert f"mount {target}" in report.removed
        assert not mount.is_mounted(target)
    finally:
        os.close(fd)
    until(lambda: bed.leftovers() == [])


def test_cleanup_of_a_directory_that_never_was(tmp_path: Path) -> None:
    report = clean_up(DeviceService(tmp_path / "none", Settings()))
    assert (report.removed, report.in_use) == ([], [])


def test_cleanup_after_the_run_directory_was_removed(bed: Bed) -> None:
    device = bed.service.attach(bed.config("a"), "a")
    shutil.rmtree(bed.run_dir)
    assert clean_up(bed.service).removed == ["device a"]
    until(lambda: Process.of(device.pid) is None)
    assert bed.leftovers() == []
    assert bed.host.wait(60) == 0  # nobody could reach it any more
