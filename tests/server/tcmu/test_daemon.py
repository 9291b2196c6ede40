"""The TCMU daemon with real devices: attaching as overlaybd's tools do, being killed, images that go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obdlab.devices.tcmu import configfs, uio
from obdlab.devices.tcmu.netlink import Event, What
from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.layers.append import AppendUpper
from obdlab.server.forking import Signals
from obdlab.server.tcmu.daemon import TcmuDaemon
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests.devices.contract import read_direct, write_direct
from tests.devices.verifying import verified

pytestmark = pytest.mark.vm

GOLDEN = Path(__file__).parents[2] / "golden" / "ext4"
MIB = 1 << 20
#: Emulated processors are slow.
PATIENCE_S = 90.0


class Daemon:
    """``obdlab serve tcmu`` as a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "daemon.log"
        self.errors = directory / "standard-error"
        self._cache = directory / "cache"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "obdlab", "serve", "tcmu", "--cache-dir", str(self._cache)]
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*command, "--log-file", str(self.log)], stdout=subprocess.PIPE, stderr=errors
            )
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            assert stream.readline() == b"obdlab tcmu: ready\n", self.errors.read_text()

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(PATIENCE_S)

    def logged(self, text: str, *, after: int = 0) -> None:
        """Wait for a line in the log, in what came after so many characters."""
        wait_for(lambda: text in self.log.read_text()[after:], f"no line with {text!r} in the log")


def wait_for(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
    yield daemon
    if daemon.process.poll() is None:
        daemon.end()
    sys.stderr.write(daemon.log.read_text() + daemon.errors.read_text())


def golden_config(directory: Path, **changes: str) -> Path:
    lowers = tuple(LowerConfig(file=str(GOLDEN / f"layer{n}.obd")) for n in (1, 2))
    path = directory / "config.v1.json"
    ImageConfig(lowers=lowers, **changes).save(path)
    return path


def writable_config(directory: Path, size: int) -> Path:
    data, index = directory / "data", directory / "index"
    AppendUpper.create(data, index, size).close()
    path = directory / "config.v1.json"
    ImageConfig(upper=UpperConfig(index=str(index), data=str(data)), result_file="result").save(path)
    return path


@contextmanager
def attached(device_id: str, config: Path) -> Iterator[Path]:
    disk = configfs.attach(device_id, config)
    try:
        yield disk
    finally:
        configfs.remove(configfs.Target.of(device_id))


@contextmanager
def mounted(disk: Path, target: Path, *, read_only: bool = False) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    mount.mount(disk, target, read_only=read_only)
    try:
        yield target
    finally:
        mount.unmount(target)


def server_of(device_id: str) -> int:
    """Return the process that serves a device."""
    name = f"obdlab:dev_{device_id}"[:15]
    for entry in Path("/proc").glob("[0-9]*/comm"):
        try:
            if entry.read_text().strip() == name:
                return int(entry.parent.name)
        except OSError:
            continue
    return 0


def test_an_image_is_read_as_the_originals_tools_attach_it(daemon: Daemon, tmp_path: Path) -> None:
    config = golden_config(tmp_path, result_file="result")
    with attached("128", config) as disk:
        assert Path("/sys/kernel/config/target/core/user_999999999/dev_128/enable").read_text().strip() == "1"
        assert Path("/sys/kernel/config/target/loopback/naa.1990000000000128/tpgt_1/nexus").exists()
        assert (tmp_path / "result").read_text() == "success"
        (name,) = [name for name in uio.devices().values() if name.device == "dev_128"]
        assert (name.handler, name.config) == ("overlaybd", str(config))
        expected = json.loads((GOLDEN / "expected.m2.json").read_text())
        with mounted(disk, tmp_path / "mnt", read_only=True) as target:
            assert os.listdir(target)
            assert expected
    assert not Path("/sys/kernel/config/target/core/user_999999999/dev_128").exists()
    wait_for(lambda: server_of("128") == 0, "the server stays")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_writable_image_is_trimmed_and_read_again(daemon: Daemon, tmp_path: Path, fs: str) -> None:
    config = writable_config(tmp_path, 320 * MIB)
    content = os.urandom(2 * MIB)
    with attached("rw", config) as disk:
        subprocess.run([f"mkfs.{fs}", "-q", disk], check=True, capture_output=True)
        with mounted(disk, tmp_path / "mnt") as target:
            (target / "kept").write_bytes(content)
            (target / "gone").write_bytes(content)
            os.sync()
            (target / "gone").unlink()
            os.sync()
            done = subprocess.run(["fstrim", "-v", target], check=True, capture_output=True, text=True)
            assert "0 B" not in done.stdout
    with attached("rw", config) as disk, mounted(disk, tmp_path / "mnt") as target:
        assert (target / "kept").read_bytes() == content
        assert not (target / "gone").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_servers_and_daemon_cost_no_byte(daemon: Daemon, tmp_path: Path) -> None:
    config = writable_config(tmp_path, 64 * MIB)
    with attached("fio", config) as disk, verified(disk):
        for who in ("server", "daemon", "both", "server"):
            time.sleep(1.5)
            pid = server_of("fio")
            if who in ("daemon", "both"):
                daemon.end(signal.SIGKILL)
            if who in ("server", "both") and pid:
                os.kill(pid, signal.SIGKILL)
            if who in ("daemon", "both"):
                daemon.start()
            wait_for(lambda old=pid, who=who: server_of("fio") not in ((0, old) if who != "daemon" else (0,)), who)


def test_a_daemon_that_ends_leaves_devices_that_wait(daemon: Daemon, tmp_path: Path) -> None:
    with attached("stays", golden_config(tmp_path)) as disk:
        first = read_direct(disk, 0, MIB)
        daemon.end()
        assert server_of("stays") == 0
        reader = subprocess.Popen(["dd", f"if={disk}", "of=/dev/null", "bs=1M", "count=1", "iflag=direct"])
        time.sleep(1)
        assert reader.poll() is None
        daemon.start()
        assert reader.wait(PATIENCE_S) == 0
        assert read_direct(disk, 0, MIB) == first


def test_what_a_daemon_takes_over_after_a_kill_is_logged(daemon: Daemon, tmp_path: Path) -> None:
    before = len(daemon.log.read_text())
    with attached("found", golden_config(tmp_path)) as disk:
        daemon.logged("dev_found: added, served by process", after=before)
        first = server_of("found")
        # The daemon alone: the server goes on, and its device is taken over when it dies.
        before = len(daemon.log.read_text())
        daemon.end(signal.SIGKILL)
        daemon.start()
        daemon.logged("obdlab tcmu: ready", after=before)
        daemon.logged(f"dev_found: served by process {first}", after=before)
        os.kill(first, signal.SIGKILL)
        daemon.logged("the process that served it is gone, taking it over", after=before)
        wait_for(lambda: server_of("found") not in (0, first), "no other server")
        daemon.logged(f"dev_found: taken over, served by process {server_of('found')}", after=before)
        # Both.
        before = len(daemon.log.read_text())
        second = server_of("found")
        daemon.end(signal.SIGKILL)
        os.kill(second, signal.SIGKILL)
        daemon.start()
        daemon.logged("dev_found (uio", after=before)
        daemon.logged("dev_found: taken over, served by process", after=before)
        assert len(read_direct(disk, 0, MIB)) == MIB


@pytest.mark.slow
def test_a_device_without_a_daemon_is_taken_away_and_its_readers_fail(daemon: Daemon, tmp_path: Path) -> None:
    disk = configfs.attach("orphan", writable_config(tmp_path, 16 * MIB))
    write_direct(disk, 0, b"x" * 4096)
    daemon.end()
    reader = subprocess.Popen(["dd", f"if={disk}", "of=/dev/null", "bs=1M", "count=1", "iflag=direct"])
    time.sleep(1)
    assert reader.poll() is None
    done = subprocess.run(
        [sys.executable, "-m", "obdlab", "device", "tcmu-detach", "orphan"], check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 0
    assert reader.wait(PATIENCE_S) != 0
    assert not configfs.Target.of("orphan").backstore.exists()
    daemon.start()


def test_an_image_that_is_lost_fails_its_readers_until_it_is_back(daemon: Daemon, tmp_path: Path) -> None:
    config = writable_config(tmp_path, 16 * MIB)
    with attached("lost", config) as disk:
        (tmp_path / "data").rename(tmp_path / "away")
        os.kill(server_of("lost"), signal.SIGKILL)
        daemon.logged("cannot open the image again, its requests fail")
        with pytest.raises(OSError):
            read_direct(disk, 0, 4096)
        (tmp_path / "away").rename(tmp_path / "data")
        daemon.logged("the image could be opened again")
        assert read_direct(disk, 0, 4096) == bytes(4096)


@pytest.mark.parametrize("trouble", ["no file", "no JSON", "no layer"])
def test_why_an_add_failed_is_told(daemon: Daemon, tmp_path: Path, trouble: str) -> None:
    config = golden_config(tmp_path, result_file="result")
    if trouble == "no JSON":
        config.write_text("{")
    elif trouble == "no layer":
        ImageConfig(lowers=(LowerConfig(file="/nowhere/layer"),), result_file="result").save(config)
    else:
        config = tmp_path / "other.json"
    with pytest.raises(DeviceError, match="No such file or directory"):
        configfs.attach("bad", config)
    assert not configfs.Target.of("bad").backstore.exists()
    result = tmp_path / ("result" if trouble == "no layer" else "init-debug.log")
    assert result.read_text().startswith("failed:")
    if config.exists():
        command = [sys.executable, "-m", "obdlab", "device", "tcmu-attach", "--id", "bad", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert ("/nowhere/layer" if trouble == "no layer" else "JSON") in done.stderr


def test_the_scsi_tools_are_answered(daemon: Daemon, tmp_path: Path) -> None:
    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    with attached("sg", writable_config(tmp_path, 8 * MIB)) as disk:
        assert "TCMU device" in run("sg_inq", disk)
        for page in ("sv", "sn", "di", "bl", "bdc", "lbpv"):
            run("sg_vpd", f"--page={page}", disk)
        assert "Device size: 8388608 bytes" in run("sg_readcap", "--16", disk)
        assert "Device size: 8388608 bytes" in run("sg_readcap", disk)
        run("sg_modes", "--all", disk)
        run("sg_sync", disk)
        with disk.open("r+b") as file:
            file.write(b"x" * MIB)
        run("sg_unmap", "--lba=8", "--num=16", "--force", disk)
        assert read_direct(disk, 0, 32768) == b"x" * 4096 + bytes(8192) + b"x" * 20480
        run("sg_write_same", "--lba=0", "--num=8", "--unmap", "--in=/dev/zero", "--xferlen=512", disk)
        assert read_direct(disk, 0, 4096) == bytes(4096)
        pattern = tmp_path / "pattern"
        pattern.write_bytes(b"pattern!" * 64)
        run("sg_write_same", "--lba=24", "--num=8", f"--in={pattern}", "--xferlen=512", disk)
        assert read_direct(disk, 12288, 4096) == b"pattern!" * 512


@pytest.mark.slow
@pytest.mark.parametrize("what", [What.ADDED, What.REMOVED, What.RECONFIGURED])
def test_an_event_of_a_device_that_is_gone_again_does_no_harm(tmp_path: Path, what: What) -> None:
    config = golden_config(tmp_path, result_file="result")
    handler = signal.getsignal(signal.SIGTERM)
    signals = Signals(signal.SIGTERM)
    daemon = TcmuDaemon(Settings())
    daemon._on_event(Event(what, f"tcm-user/1/dev_gone/overlaybd/{config}", 4095, 1 << 30))

    def stop() -> None:
        try:
            wait_for(lambda: not daemon._servers, "its server stays")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    try:
        daemon.run(signals)
    finally:
        stopper.join()
        signals.forget()
        signal.signal(signal.SIGTERM, handler)
    assert not daemon._servers
    if what is What.ADDED:
        assert (tmp_path / "result").read_text() == "failed:/dev/uio4095: cannot open: No such file or directory"


def test_an_unknown_handler_is_refused_and_hangs_nobody(daemon: Daemon) -> None:
    target = configfs.Target.of("unknown")
    with pytest.raises(DeviceError, match="No such file or directory"):
        configfs.create(target, "nobody//at/all")
    assert not target.backstore.exists()
