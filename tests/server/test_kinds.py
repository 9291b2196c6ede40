"""Images as devices of every kind the kernel has, through the one way of attaching; survival, upgrade, growth."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from obdlab.cli.host import checks
from obdlab.devices import kinds
from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.layers.append import AppendUpper
from obdlab.server import hostclient
from obdlab.server.cleanup import clean_up
from obdlab.server.client import AttachedDevice, DeviceService
from obdlab.server.live import LiveDevice
from obdlab.server.rundir import DeviceRecord, DeviceState
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests.devices.contract import read_direct, write_direct
from tests.devices.verifying import verified
from tests.server.killing import kill, kill_for_good, until

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
MIB = 1 << 20
#: Emulated processors are slow.
PATIENCE_S = 90.0
OTHERS = ("ublk", "tcmu")

in_vm = pytest.mark.vm


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all tests: a device host takes long to start on emulated processors."""
    directory = tmp_path_factory.mktemp("kinds").resolve() / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostclient, "_HOST_START_TIMEOUT_S", 300.0)
        service_of(directory, "auto").start_host()
        yield directory
        service_of(directory, "auto").shutdown(force=True)
    sys.stderr.write((directory / "host.log").read_text() if (directory / "host.log").exists() else "")


def service_of(run_dir: Path, kind: str, **changes: object) -> DeviceService:
    settings = replace(Settings(), cache_dir=run_dir / "cache", device_kind=kind, **changes)  # type: ignore[arg-type]
    return DeviceService(run_dir, settings)


@contextmanager
def serving(run_dir: Path, kind: str, **changes: object) -> Iterator[DeviceService]:
    """Give a service that has no devices, and has none afterwards."""
    service = service_of(run_dir, kind, **changes)
    try:
        yield service
    finally:
        for device in service.list():
            service.detach(device.device_id, force=True)


def golden_config(directory: Path) -> Path:
    path = directory / "config.v1.json"
    ImageConfig(lowers=tuple(LowerConfig(file=str(GOLDEN / f"layer{n}.obd")) for n in (1, 2))).save(path)
    return path


def writable_config(directory: Path, size: int) -> Path:
    data, index = directory / "data", directory / "index"
    AppendUpper.create(data, index, size).close()
    path = directory / "config.v1.json"
    ImageConfig(upper=UpperConfig(index=str(index), data=str(data))).save(path)
    return path


def replaced(service: DeviceService, device: AttachedDevice) -> AttachedDevice:
    """Wait for another server; return the device then."""

    def found() -> bool:
        record = DeviceRecord.load(service.run_dir.device(device.device_id))
        return record is not None and record.pid != device.pid and record.process.alive

    until(found, PATIENCE_S)
    return service.list()[0]


@in_vm
@pytest.mark.parametrize("kind", OTHERS)
def test_an_image_is_attached_listed_mounted_and_gone(tmp_path: Path, run_dir: Path, kind: str) -> None:
    with serving(run_dir, kind) as service:
        config = golden_config(tmp_path)
        device = service.attach(config)
        assert (device.kind, device.read_only, device.alive) == (kind, True, True)
        assert str(device.path).startswith({"ublk": "/dev/ublkb", "tcmu": "/dev/sd"}[kind])
        assert service.attach(config) == device
        with pytest.raises(DeviceError, match=f"attached as {kind} .wanted fuse.loop"):
            service_of(run_dir, "fuse+loop").attach(config)
        (tmp_path / "mnt").mkdir()
        service.mount(device, tmp_path / "mnt")
        assert os.listdir(tmp_path / "mnt")
        with pytest.raises(DeviceError, match="mounted on"):
            service.detach(device.device_id)
        assert [each.path for each in service.list()] == [device.path]
        assert service.statistics(device.device_id)["reads"] > 0
        mount.unmount(tmp_path / "mnt")
        assert service.detach(device.device_id)
        assert service.list() == []
        assert kinds.devices_of(service.run_dir.device(device.device_id)) == []
        assert not device.path.exists()


@in_vm
@pytest.mark.parametrize("kind", OTHERS)
def test_a_killed_server_is_replaced_and_an_upgrade_takes_over(tmp_path: Path, run_dir: Path, kind: str) -> None:
    with serving(run_dir, kind) as service:
        device = service.attach(writable_config(tmp_path, 16 * MIB))
        write_direct(device.path, MIB, b"written!" * 512)
        kill(device.pid)
        assert read_direct(device.path, MIB, 4096) == b"written!" * 512
        device = replaced(service, device)
        assert (device.restarts, device.kind) == (1, kind)
        assert service.upgrade(device.device_id, force=True)
        after = service.list()[0]
        assert after.pid != device.pid
        assert after.keeper_pid != device.keeper_pid
        assert after.path == device.path
        assert read_direct(device.path, MIB, 4096) == b"written!" * 512
        write_direct(device.path, 0, b"again!!!" * 512)
        assert service.detach(device.device_id)


@in_vm
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "fs"),
    [("ublk", "xfs"), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("ublk", "ext4"), ("tcmu", "xfs")))],
)
def test_a_file_system_is_written_trimmed_and_read_again(tmp_path: Path, run_dir: Path, kind: str, fs: str) -> None:
    content, target = os.urandom(2 * MIB), tmp_path / "mnt"
    target.mkdir()
    with serving(run_dir, kind) as service:
        config = writable_config(tmp_path, 320 * MIB)
        device = service.attach(config)
        subprocess.run([f"mkfs.{fs}", "-q", device.path], check=True, capture_output=True)
        mount.mount(device.path, target, read_only=False)
        (target / "kept").write_bytes(content)
        (target / "gone").write_bytes(content)
        os.sync()
        (target / "gone").unlink()
        os.sync()
        done = subprocess.run(["fstrim", "-v", target], check=True, capture_output=True, text=True)
        assert "(0 bytes)" not in done.stdout
        mount.unmount(target)
        assert service.detach(device.device_id)
        device = service.attach(config)
        check = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}[fs]
        subprocess.run([*check, device.path], check=True, capture_output=True)
        mount.mount(device.path, target, read_only=False)
        assert (target / "kept").read_bytes() == content
        assert not (target / "gone").exists()
        mount.unmount(target)


@in_vm
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", OTHERS)
def test_kills_under_load_cost_no_byte(tmp_path: Path, run_dir: Path, kind: str) -> None:
    with serving(run_dir, kind) as service:
        device = service.attach(writable_config(tmp_path, 64 * MIB))
        with verified(device.path):
            for round_ in range(10):
                time.sleep(1.0 + round_ / 5)
                kill(device.pid)
                device = replaced(service, device)
            service.upgrade(device.device_id, force=True)
        assert service.list()[0].restarts >= 10


@in_vm
@pytest.mark.slow
def test_a_tcmu_device_grows_and_a_ublk_device_says_that_it_cannot(tmp_path: Path, run_dir: Path) -> None:
    for kind in OTHERS:
        directory = tmp_path / kind
        directory.mkdir()
        with serving(run_dir, kind) as service:
            device = service.attach(writable_config(directory, 8 * MIB))
            live = LiveDevice(service, device.device_id)
            if kind == "ublk":
                with pytest.raises(DeviceError, match="cannot grow"):
                    live.resize(24 * MIB)
                continue
            assert live.resize(24 * MIB) == 8 * MIB
            assert int(Path(f"/sys/block/{device.path.name}/size").read_text()) * 512 == 24 * MIB
            write_direct(device.path, 20 * MIB, b"x" * 4096)
            assert read_direct(device.path, 20 * MIB, 4096) == b"x" * 4096


@in_vm
@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_an_image_that_cannot_be_opened_again_fails_its_users(tmp_path: Path, run_dir: Path, kind: str) -> None:
    with serving(run_dir, kind, read_deadline_s=2.0) as service:
        device = service.attach(writable_config(tmp_path, 16 * MIB))
        write_direct(device.path, 0, b"x" * 4096)
        (tmp_path / "data").rename(tmp_path / "away")
        kill(device.pid)
        begun = time.monotonic()
        with pytest.raises(OSError):
            read_direct(device.path, 0, 4096)
        assert time.monotonic() - begun < PATIENCE_S
        assert "given up" in service.run_dir.host_log.read_text()
        until(lambda: not any(each.alive for each in service.list()), PATIENCE_S)
        service.detach(device.device_id)
        assert kinds.devices_of(service.run_dir.device(device.device_id)) == []
        (tmp_path / "away").rename(tmp_path / "data")
        device = service.attach(tmp_path / "config.v1.json")
        assert read_direct(device.path, 0, 4096) == b"x" * 4096


@in_vm
@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_a_released_device_goes_with_its_last_user(tmp_path: Path, run_dir: Path, kind: str) -> None:
    with serving(run_dir, kind) as service:
        device = service.attach(golden_config(tmp_path))
        (tmp_path / "mnt").mkdir()
        service.mount(device, tmp_path / "mnt")
        other = subprocess.Popen(["unshare", "--mount", "sleep", "1000"])
        until(lambda: os.readlink(f"/proc/{other.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"), PATIENCE_S)
        mount.unmount(tmp_path / "mnt")
        assert not service.release(device.device_id)
        assert service.list()[0].alive
        other.kill()
        other.wait()
        until(lambda: service.list() == [], PATIENCE_S)
        until(lambda: not device.path.exists(), PATIENCE_S)


@in_vm
@pytest.mark.parametrize("kind", OTHERS)
def test_a_killed_keeper_is_replaced_and_its_server_stays(tmp_path: Path, run_dir: Path, kind: str) -> None:
    with serving(run_dir, kind) as service:
        device = service.attach(writable_config(tmp_path, 16 * MIB))
        write_direct(device.path, MIB, b"written!" * 512)
        kill(device.keeper_pid)
        until(lambda: service.list()[0].state is DeviceState.WHOLE, PATIENCE_S)
        (kept,) = service.list()
        assert kept.keeper_pid != device.keeper_pid
        assert (kept.pid, kept.restarts) == (device.pid, 0)
        kill(kept.pid)
        assert read_direct(device.path, MIB, 4096) == b"written!" * 512


@in_vm
@pytest.mark.parametrize("kind", OTHERS)
def test_a_device_that_lost_keeper_and_server_is_served_again(tmp_path: Path, run_dir: Path, kind: str) -> None:
    """The kernel keeps it; a host notices, the one that forked them or a later one."""
    with serving(run_dir, kind) as service:
        device = service.attach(writable_config(tmp_path, 16 * MIB))
        write_direct(device.path, MIB, b"written!" * 512)
        kill_for_good(device)
        assert read_direct(device.path, MIB, 4096) == b"written!" * 512
        until(lambda: service.list()[0].state is DeviceState.WHOLE, PATIENCE_S)
        service.stop_host()
        (again,) = service.list()
        assert (again.path, again.restarts) == (device.path, 1)
        kill_for_good(again)
        reader = subprocess.Popen(["dd", f"if={device.path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"])
        service.start_host()
        assert reader.wait(PATIENCE_S) == 0
        assert read_direct(device.path, MIB, 4096) == b"written!" * 512


@in_vm
@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_what_was_killed_for_good_is_cleaned_up(tmp_path: Path, run_dir: Path, kind: str) -> None:
    with serving(run_dir, kind) as service:
        device = service.attach(writable_config(tmp_path, 16 * MIB))
        service.stop_host()  # it would have the device served again
        kill_for_good(device)
        reader = subprocess.Popen(["dd", f"if={device.path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"])
        time.sleep(0.5)
        report = clean_up(service, force=True)
        assert report.in_use == []
        assert kinds.devices_of(service.run_dir.device(device.device_id)) == []
        assert not device.path.exists()
        assert reader.wait(PATIENCE_S) != 0


@in_vm
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("kind", OTHERS)
def test_many_rounds_leave_nothing(tmp_path: Path, run_dir: Path, kind: str, quarter: int) -> None:
    rounds = int(os.environ.get("OBDLAB_ROUNDS", "1000")) // 4  # a quarter takes 5 to 7 minutes
    with serving(run_dir, kind) as service:
        config = golden_config(tmp_path)
        for _ in range(rounds):
            device = service.attach(config)
            read_direct(device.path, 0, 4096)
            assert service.detach(device.device_id)
        assert service.list() == []
        assert kinds.directories_below(service.run_dir.devices) == set()


@in_vm
def test_doctor_names_what_the_host_has_and_the_choice_can_be_forced(tmp_path: Path, run_dir: Path) -> None:
    found = {check.name: check for check in checks.run_checks() if check.purpose == "device kinds"}
    assert [found[kind] for kind in ("fuse+loop", *OTHERS) if not found[kind].ok] == []
    assert found["chosen by itself"].detail.startswith(kinds.best().name)
    with serving(run_dir, "auto") as service:
        config = golden_config(tmp_path)
        assert service.attach(config).kind == kinds.best().name
        command = [sys.executable, "-m", "obdlab", "device", "attach", "--device", "ublk", "--id", "forced"]
        command += ["--run-dir", str(service.run_dir.path), "--cache-dir", str(tmp_path / "cache"), str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.startswith("/dev/ublkb"), done.stderr


@pytest.mark.kernel
def test_a_kind_that_is_missing_is_refused_with_what_to_do(tmp_path: Path, run_dir: Path) -> None:
    missing = [kind for kind in OTHERS if kinds.find(kind).missing()]
    if not missing:
        pytest.skip("this host has all kinds")
    with serving(run_dir, missing[0]) as service:
        with pytest.raises(DeviceError, match=f"this host has no {missing[0]} devices: .*try: .*modprobe"):
            service.attach(golden_config(tmp_path))
        assert service.list() == []
        assert list(service.run_dir.devices.iterdir()) == []


def test_names() -> None:
    with pytest.raises(DeviceError, match=r"no such kind of device .got 'nbd', wanted auto or one of"):
        kinds.find("nbd")
    assert kinds.find("auto") in kinds.every()
