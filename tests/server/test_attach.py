"""Attach and detach through a device host: the promises made to its clients, also when processes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obdlab.devices.usage import TRANSIENT_USE_S
from obdlab.errors import DeviceError, ObdlabError, SourceError
from obdlab.image.config import ConfigError
from obdlab.server import wire
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.messages import Failed
from obdlab.server.rundir import DeviceRecord, held
from obdlab.settings.settings import Settings
from obdlab.system import mount
from obdlab.system.processes import Process
from tests.devices.contract import MIB
from tests.server.bed import Bed, bed, start_host
from tests.server.hosting import content_of
from tests.server.killing import kill_for_good, until

__all__ = ["bed"]

pytestmark = pytest.mark.kernel


def test_attach_read_detach(bed: Bed) -> None:
    config = bed.config("a", size=3 * MIB, seed=1)
    device = bed.service.attach(config, "dev-1")
    assert (device.device_id, device.size, device.read_only) == ("dev-1", 3 * MIB, True)
    assert (device.config, device.kind, device.alive) == (config, "fuse+loop", True)
    assert device.path.read_bytes() == content_of({"size": 3 * MIB, "seed": 1})
    assert bed.service.list() == [device]
    counters = bed.service.statistics("dev-1")
    assert counters["read_bytes"] >= 3 * MIB
    assert counters["errors"] == 0
    server = Process.of(device.pid)
    assert server is not None
    assert bed.service.detach("dev-1")
    assert not server.alive
    assert not bed.service.detach("dev-1")
    assert bed.service.list() == []
    assert bed.leftovers() == []
    with pytest.raises(DeviceError, match="dev-1: its server does not answer"):
        bed.service.statistics("dev-1")


def test_attach_again_finds_the_same_device(bed: Bed) -> None:
    config = bed.config("a")
    first = bed.service.attach(config)
    assert bed.service.attach(config) == first
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: bed.service.attach(config), range(16))) == {first}


def test_many_at_the_same_time(bed: Bed) -> None:
    configs = [bed.config(str(number), seed=number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        devices = list(pool.map(bed.service.attach, configs))
    assert len({device.path for device in devices}) == 12
    for number, device in enumerate(devices):
        assert device.path.read_bytes() == content_of({"seed": number})
    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(lambda device: bed.service.detach(device.device_id), devices))
    assert bed.leftovers() == []


def test_an_id_belongs_to_one_config(bed: Bed) -> None:
    config = bed.config("a")
    bed.service.attach(config, "one")
    with pytest.raises(DeviceError, match=r"one: already attached for .*a\.json \(wanted .*b\.json\)"):
        bed.service.attach(bed.config("b"), "one")
    bed.config("a", seed=9)
    with pytest.raises(DeviceError, match=r"a\.json has changed since"):
        bed.service.attach(config, "one")


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        (
            {"fail": "lower 2 sha256:ab: registry answered 404"},
            SourceError,
            "lower 2 sha256:ab: registry answered 404",
        ),
        ({"bug": True}, DeviceError, "KeyError: 'a bug'"),
        ({"die": True}, DeviceError, "ended unexpectedly while opening the image"),
        ({"size": 1000}, DeviceError, "512-byte sectors"),
    ],
)
def test_a_failed_attach_tells_why_and_leaves_nothing(
    bed: Bed, what: dict[str, Any], kind: type[ObdlabError], message: str
) -> None:
    config = bed.config("bad", **what)
    with pytest.raises(ObdlabError) as caught:
        bed.service.attach(config, "bad")
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert str(config) in str(caught.value)
    assert bed.leftovers() == []
    assert bed.service.list() == []
    assert list((bed.run_dir / "devices").iterdir()) == []
    bed.config("bad")
    assert bed.service.attach(config, "bad").size == MIB


def test_an_attach_that_takes_too_long_is_given_up(bed: Bed) -> None:
    config = bed.config("slow", sleep_s=60)
    started = time.monotonic()
    # On a busy machine the host's answer may be late, too.
    with pytest.raises(DeviceError, match=r"gave up at the deadline of the attach|no answer within"):
        bed.service.attach(config, "slow", timeout_s=0.5)
    assert time.monotonic() - started < 50
    until(lambda: bed.leftovers() == [])
    until(lambda: list((bed.run_dir / "devices").iterdir()) == [])


def test_all_waits_of_a_call_count_against_its_deadline(bed: Bed) -> None:
    """A stopped host takes connections and requests, and answers none."""
    bed.host.send_signal(signal.SIGSTOP)
    try:
        for call in (
            lambda: bed.service.attach(bed.config("a"), "a", timeout_s=3.0),
            lambda: bed.service.upgrade("a", timeout_s=3.0),
        ):
            begun = time.monotonic()
            with pytest.raises(DeviceError, match="no answer within"):
                call()
            assert 2.0 < time.monotonic() - begun < 30.0
    finally:
        bed.host.send_signal(signal.SIGCONT)
    assert bed.service.attach(bed.config("b"), "b").size == MIB
    until(lambda: not bed.leftovers() or bed.service.list()[0].device_id == "b")


def test_a_failed_attach_has_time_left_for_its_cause(bed: Bed) -> None:
    begun = time.monotonic()
    with pytest.raises(DeviceError, match="gave up at the deadline of the attach, while opening the image"):
        bed.service.attach(bed.config("slow", sleep_s=60.0), "slow", timeout_s=10.0)
    assert time.monotonic() - begun < 40.0


def test_a_slow_attach_does_not_hold_up_others(bed: Bed) -> None:
    slow, quick = bed.config("slow", sleep_s=30), bed.config("quick")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(bed.service.attach, slow, "slow", timeout_s=3)
        assert bed.service.attach(quick, "quick").size == MIB
        assert not future.done()
        with pytest.raises(DeviceError):
            future.result(30)


@pytest.mark.parametrize("device_id", ["", "..", "a/b", ".hidden", "x" * 129, "a\n", "ü"])
def test_device_ids_are_plain_names(bed: Bed, device_id: str) -> None:
    with pytest.raises(DeviceError, match="device id"):
        bed.service.detach(device_id)


def test_config_that_is_not_there(bed: Bed) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot read the image configuration \(No such file"):
        bed.service.attach(bed.run_dir / "nowhere.json")


def test_detach_is_refused_while_mounted(bed: Bed, tmp_path: Path) -> None:
    device = bed.service.attach(bed.config("rw", writable=True, size=16 * MIB), "rw")
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True, capture_output=True)
    target = tmp_path / "mnt"
    target.mkdir()
    bed.service.mount(device, target, read_only=False)
    try:
        with pytest.raises(DeviceError, match=rf"{device.path}: still in use \(mounted on {target}\)"):
            bed.service.detach("rw")
        (target / "file").write_bytes(b"still works")
        os.kill(device.pid, signal.SIGTERM)
        os.kill(device.pid, signal.SIGINT)
        (target / "more").write_bytes(b"also after signals")
        os.sync()
    finally:
        mount.unmount(target)
    until(lambda: bed.service.release("rw") or not bed.service.list(), timeout_s=60)


def test_detach_waits_for_one_that_drops_its_copy_of_the_mount(bed: Bed, tmp_path: Path) -> None:
    device = bed.service.attach(bed.config("rw", writable=True, size=16 * MIB), "rw")
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True, capture_output=True)
    target = tmp_path / "mnt"
    target.mkdir()
    bed.service.mount(device, target)
    # A starting container on a busy machine: it keeps its copies for longer than TRANSIENT_USE_S.
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"echo; exec sleep {2 * TRANSIENT_USE_S}"],
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        mount.unmount(target)
        assert bed.service.detach("rw", patience_s=60.0)
        assert other.wait(60) == 0
    assert bed.service.list() == []


def test_release_while_another_namespace_has_a_copy_of_the_mount(bed: Bed, tmp_path: Path) -> None:
    device = bed.service.attach(bed.config("rw", writable=True, size=16 * MIB), "rw")
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True, capture_output=True)
    target = tmp_path / "mnt"
    target.mkdir()
    bed.service.mount(device, target)
    assert not bed.service.release("rw")  # mounted here: stays
    other = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        mount.unmount(target)
        with pytest.raises(DeviceError, match=r"still in use \(in another mount namespace, that of process"):
            bed.service.detach("rw")
        assert not bed.service.release("rw")
        assert bed.service.list() == [device]
    finally:
        other.communicate(timeout=60)
    until(lambda: bed.service.list() == [], timeout_s=60)
    assert bed.leftovers() == []


def test_sigterm_stops_an_unused_device(bed: Bed) -> None:
    device = bed.service.attach(bed.config("a"), "a")
    os.kill(device.pid, signal.SIGTERM)
    until(lambda: Process.of(device.pid) is None)
    assert bed.leftovers() == []
    until(lambda: bed.service.list() == [])  # its keeper ends after it
    assert bed.service.attach(bed.config("a"), "a").pid != device.pid


def test_sigterm_does_not_cut_the_last_flush_short(bed: Bed, tmp_path: Path) -> None:
    flushed = tmp_path / "flushed"
    device = bed.service.attach(bed.config("a", size=MIB, flushed=str(flushed)), "a")
    with ThreadPoolExecutor() as threads:
        detached = threads.submit(bed.service.detach, "a")
        until(flushed.exists)
        os.kill(device.pid, signal.SIGTERM)
        assert detached.result(60)
    assert flushed.read_text() == "done"


def test_a_host_that_cannot_fork_says_so_and_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path.resolve() / "run"
    bed = Bed(run_dir, DeviceService(run_dir, Settings()), start_host(run_dir, "--refuse-to-fork-once"))
    try:
        with pytest.raises(DeviceError, match="cannot fork: Resource temporarily unavailable"):
            bed.service.attach(bed.config("a"), "a")
        assert bed.service.attach(bed.config("a"), "a").size == MIB
        assert bed.host.poll() is None
    finally:
        clean_up(bed.service, force=True)
        bed.kill_host()


def test_mount_failure_tells_the_servers_cause(bed: Bed, tmp_path: Path) -> None:
    device = bed.service.attach(bed.config("t", trouble_at=0), "t")
    with pytest.raises(DeviceError, match=r"superblock.*registry answered 500"):
        bed.service.mount(device, tmp_path)
    assert "registry answered 500" in bed.service.last_error("t")
    assert bed.service.statistics("t")["errors"] > 0


def test_a_directory_that_comes_and_goes_can_be_held(tmp_path: Path) -> None:
    directory = tmp_path / "x"
    failures = []

    def hold_and_remove() -> None:
        try:
            for _ in range(300):
                with held(directory, 20.0):
                    directory.rmdir()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=hold_and_remove) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_idle_host_stays(bed: Bed) -> None:
    time.sleep(0.5)
    assert bed.host.poll() is None
    assert bed.service.attach(bed.config("a")).alive


def test_shutdown(bed: Bed) -> None:
    bed.service.attach(bed.config("a"), "a")
    bed.service.attach(bed.config("b"), "b")
    bed.service.shutdown()
    assert bed.leftovers() == []
    assert bed.host.wait(60) == 0
    assert not bed.service.stop_host()


def test_a_record_that_is_garbage_is_no_device(bed: Bed) -> None:
    device = bed.service.attach(bed.config("a"), "a")
    directory = bed.run_dir / "devices" / "a"
    for text in ("", "{", "[]", '{"pid": 1}'):
        (directory / "disk.json").write_text(text)
        assert DeviceRecord.load(directory) is None
        assert bed.service.list() == []
    assert bed.service.detach("a")
    until(lambda: Process.of(device.pid) is None)


def test_the_hosts_socket_is_for_its_owner_only(bed: Bed) -> None:
    assert (bed.run_dir / "host.sock").stat().st_mode & 0o777 == 0o600
    assert bed.run_dir.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "line",
    [b"\n", b"{}\n", b"[1]\n", b"nonsense\n", b'{"op": "attach"}\n', b'{"op": 5}\n', b'{"op": "attach"', b"\xff\n"],
)
def test_requests_that_are_none_are_answered_with_an_error(bed: Bed, line: bytes) -> None:
    with wire.connect(bed.run_dir / "host.sock", 5.0) as connection:
        connection.sendall(line)
        connection.shutdown(1)
        assert isinstance(wire.receive(connection, 20.0, (Failed,)), Failed)
    assert bed.service.attach(bed.config("a")).size == MIB


def test_a_second_host_leaves_the_first_alone(bed: Bed) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "obdlab.cli.device_host", "--run-dir", str(bed.run_dir), "--detach"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (second.returncode, second.stderr) == (0, "")
    assert bed.service.attach(bed.config("a")).size == MIB


def test_statistics_of_a_dead_server(bed: Bed) -> None:
    device = bed.service.attach(bed.config("a"), "a")
    kill_for_good(device)
    with pytest.raises(DeviceError, match="device a: its server does not answer"):
        bed.service.statistics("a")
    assert "does not answer" in bed.service.last_error("a")


def test_readahead_of_the_device(bed: Bed) -> None:
    service = DeviceService(bed.run_dir, Settings(device_readahead_kib=512))
    device = service.attach(bed.config("a"))
    assert Path(f"/sys/block/{device.path.name}/queue/read_ahead_kb").read_text() == "512\n"
