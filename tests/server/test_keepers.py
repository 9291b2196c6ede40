"""Keepers and servers replace each other: no I/O error while one of them lives, and no wait if neither does."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from obdlab.devices.fuse_loop import devices_of
from obdlab.server import deaths, wire
from obdlab.server.cleanup import clean_up
from obdlab.server.client import AttachedDevice, DeviceService
from obdlab.server.deaths import MAX_DEATHS, Deaths, Start
from obdlab.server.hostclient import HostClient
from obdlab.server.messages import Busy, Failed
from obdlab.server.rundir import SOCKET_NAME, DeviceRecord, DeviceState
from obdlab.server.serverprocess import ServerProcess
from obdlab.server.watchdog import Activity
from obdlab.settings.settings import Settings
from obdlab.system.processes import Process
from tests.devices.contract import MIB, read_direct, write_direct
from tests.server.bed import start_host
from tests.server.killing import kill, until
from tests.server.test_survival import (
    golden,  # noqa: F401
    golden_config,
    helpers_of,
    needs_fio,
    reading,
    writable_config,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FEW_AND_MANY = [8, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
kernel = pytest.mark.kernel


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    settings = Settings(cache_dir=tmp_path / "cache", read_deadline_s=60.0, server_processes=2)
    made = DeviceService(tmp_path.resolve() / "run", settings)
    yield made
    clean_up(made, force=True)
    assert not devices_of(made.run_dir.device("x"))


def whole(service: DeviceService) -> AttachedDevice:
    """The device, as soon as the list says that it is whole."""
    found: list[AttachedDevice] = []

    def is_whole() -> bool:
        found[:] = service.list()
        return [device.state for device in found] == [DeviceState.WHOLE]

    until(is_whole, timeout_s=60.0)
    return found[0]


def host_process(service: DeviceService) -> Process:
    known = json.loads((service.run_dir.path / "host.pid").read_text())
    return Process(known["pid"], known["start_time"])


@kernel
def test_a_killed_keeper_is_replaced_and_its_server_stays(
    service: DeviceService,
    tmp_path: Path,
    golden: bytes,  # noqa: F811
) -> None:
    device = service.attach(golden_config(tmp_path), "x")
    assert device.state is DeviceState.WHOLE
    with reading(device.path, golden):
        for _ in range(3):
            before = whole(service)
            kill(before.keeper_pid)
            after = whole(service)
            assert after.keeper_pid != before.keeper_pid
            assert (after.pid, after.restarts, after.path) == (device.pid, 0, device.path)
        kill(device.pid)  # the new keeper does what the first one did
        assert whole(service).restarts == 1
    assert "x: has a keeper again" in service.run_dir.host_log.read_text()
    assert service.detach("x")
    assert Process.of(after.keeper_pid) is None


@kernel
@pytest.mark.parametrize("kills", FEW_AND_MANY)
@pytest.mark.parametrize("kind", ["read-only", "append"])
def test_keepers_and_servers_killed_in_random_order_cost_no_error(
    service: DeviceService,
    tmp_path: Path,
    golden: bytes,  # noqa: F811
    kind: str,
    kills: int,
) -> None:
    if kind == "read-only":
        device, content = service.attach(golden_config(tmp_path), "x"), golden
    else:
        device, content = service.attach(writable_config(tmp_path, kind, 4 * MIB), "x"), bytes(2 * MIB)
    rng = random.Random(kills)
    with reading(device.path, content), writing(device, 2 * MIB, 2 * MIB):
        for _ in range(kills):
            at_present = whole(service)
            kill(rng.choice((at_present.pid, at_present.keeper_pid)))
        whole(service)


@contextmanager
def writing(device: AttachedDevice, begin: int, length: int) -> Iterator[None]:
    """Write to this part of a writable device while the block runs, and read what was written."""
    wrong: list[str] = []
    stop = threading.Event()

    def write() -> None:
        rng = random.Random(7)
        while not stop.is_set() and not wrong:
            offset, data = begin + rng.randrange(0, length, 4096), rng.randbytes(4096)
            try:
                write_direct(device.path, offset, data)
                if read_direct(device.path, offset, 4096) != data:
                    wrong.append(f"wrong bytes at {offset}")
            except OSError as error:
                wrong.append(f"{error} at {offset}")

    thread = threading.Thread(target=write)
    if not device.read_only:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join(60)
    assert not thread.is_alive()
    assert wrong == []


@kernel
def test_servers_killed_as_soon_as_they_have_answered_are_not_given_up(
    service: DeviceService,
    tmp_path: Path,
    golden: bytes,  # noqa: F811
) -> None:
    device = service.attach(golden_config(tmp_path), "x")
    for restarts in range(MAX_DEATHS + 5):
        at_present = whole(service)
        assert at_present.restarts == restarts
        assert at_present.keeper_pid == device.keeper_pid
        assert read_direct(device.path, 4096 * restarts, 4096) == golden[4096 * restarts : 4096 * (restarts + 1)]
        kill(at_present.pid)
    assert read_direct(device.path, 0, MIB) == golden[:MIB]


@kernel
def test_host_and_keeper_are_killed(service: DeviceService, tmp_path: Path, golden: bytes) -> None:  # noqa: F811
    device = service.attach(golden_config(tmp_path), "x")
    first = host_process(service)
    with reading(device.path, golden):
        kill(first.pid)
        kill(device.keeper_pid)
        kill(whole(service).pid)
        assert whole(service).restarts == 1
    second = host_process(service)
    assert second != first
    # The new host must not take after the server that has started it.
    status = Path(f"/proc/{second.pid}/status").read_text()
    assert int(Path(f"/proc/{second.pid}/oom_score_adj").read_text()) > -999
    assert [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:")] == ["0" * 16]
    assert service.stop_host()
    assert not second.alive
    assert whole(service).state is DeviceState.WHOLE


@contextmanager
def busy(device: Path) -> Iterator[None]:
    """More load than one server can bear."""
    load = ["fio", "--name=job", f"--filename={device}", "--readonly", "--direct=1", "--rw=randread", "--bs=64k"]
    load += ["--ioengine=libaio", "--iodepth=16", "--time_based", "--runtime=600"]
    with subprocess.Popen(load, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@needs_fio
@kernel
def test_both_killed_at_once_is_an_error_within_seconds_and_a_fresh_device_next(
    service: DeviceService,
    tmp_path: Path,
    golden: bytes,  # noqa: F811
) -> None:
    config = golden_config(tmp_path)
    device = service.attach(config, "x")
    errors: list[int | None] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                read_direct(device.path, 0, MIB)
            except OSError as error:
                errors.append(error.errno)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with busy(device.path):
        until(lambda: helpers_of(service), timeout_s=120)
        for process in (device.pid, device.keeper_pid):  # neither may replace the other
            os.kill(process, signal.SIGSTOP)
        for process in (device.keeper_pid, device.pid):
            os.kill(process, signal.SIGKILL)
        killed_s = time.monotonic()
        for reader in readers:
            reader.join(60)
        took_s = time.monotonic() - killed_s
        stop.set()
    assert errors == [errno.EIO] * len(readers)
    assert took_s < 5
    again = service.attach(config, "x")
    assert again.state is DeviceState.WHOLE
    assert read_direct(again.path, 0, MIB) == golden[:MIB]


@needs_fio
@kernel
def test_helpers_die_with_their_keeper_and_no_request_is_lost(
    service: DeviceService,
    tmp_path: Path,
    golden: bytes,  # noqa: F811
) -> None:
    device = service.attach(golden_config(tmp_path), "x")
    with reading(device.path, golden), busy(device.path):
        for _ in range(2):
            until(lambda: helpers_of(service), timeout_s=120)
            helpers = helpers_of(service)
            kill(whole(service).keeper_pid)
            until(lambda helpers=helpers: not any(map(Process.of, helpers)))  # type: ignore[misc]
            assert whole(service).pid == device.pid


@pytest.fixture
def slow_bed(tmp_path: Path) -> Iterator[DeviceService]:
    """Whose images take a second to open."""
    run_dir = tmp_path.resolve() / "run"
    host = start_host(run_dir)
    made = DeviceService(run_dir, Settings())
    try:
        yield made
    finally:
        clean_up(made, force=True)
        host.kill()
        host.wait(60)
        assert host.stdout is not None
        host.stdout.close()


@kernel
def test_a_keeper_killed_while_its_server_starts_leaves_that_at_work(slow_bed: DeviceService, tmp_path: Path) -> None:
    config = tmp_path / "slow.json"
    config.write_text(json.dumps({"size": MIB, "seed": 3, "sleep_s": 1.0}))
    device = slow_bed.attach(config, "x")
    wanted = read_direct(device.path, 0, MIB)
    kill(device.pid)
    directory = slow_bed.run_dir.device("x")
    until(lambda: (record := DeviceRecord.load(directory)) is not None and record.starting is not None)
    assert slow_bed.list()[0].state is DeviceState.RESTARTING
    kill(device.keeper_pid)
    assert slow_bed.list()[0].state is DeviceState.RESTARTING  # and not swept as dead
    assert read_direct(device.path, 0, MIB) == wanted
    after = whole(slow_bed)
    assert {after.pid, after.keeper_pid}.isdisjoint({device.pid, device.keeper_pid})
    kill(after.pid)
    assert read_direct(device.path, 0, MIB) == wanted


@kernel
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "is served by others"),
        ({"server": None}, "keep request: Expected `object`, got `null` - at `$.server`"),
        ({"server": {"path": 7}}, "keep request: "),
        ({"device_id": "other"}, "no such device is being served"),
        ({"device_id": "../x"}, "device id: letters"),
        ({"timeout_s": "soon"}, "keep request: Expected `float`, got `str` - at `$.timeout_s`"),
    ],
)
def test_a_process_that_is_not_its_server_gets_no_keeper(
    service: DeviceService, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    device = service.attach(golden_config(tmp_path), "x")
    server = {"kind": device.kind, "path": str(device.path), "size": device.size, "read_only": True}
    request = {"op": "keep", "device_id": "x", "timeout_s": 10.0, "server": server | {"can_change_servers": True}}
    with wire.connect(service.run_dir.path / SOCKET_NAME, 10.0) as connection:
        connection.sendall(json.dumps(request | changed).encode() + b"\n")
        answer = wire.receive(connection, 30.0, (Failed,))
    assert isinstance(answer, Failed)
    assert message in answer.error
    assert whole(service).keeper_pid == device.keeper_pid
    assert sorted(entry.name for entry in service.run_dir.devices.iterdir()) == ["x"]


@kernel
def test_clients_that_need_a_host_at_once_start_one(
    service: DeviceService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[float] = []
    start = HostClient._launch

    def counted(self: HostClient, timeout_s: float) -> None:
        started.append(timeout_s)
        start(self, timeout_s)

    monkeypatch.setattr(HostClient, "_launch", counted)
    config = golden_config(tmp_path)
    with ThreadPoolExecutor(6) as pool:
        devices = list(pool.map(lambda number: service.attach(config, f"d{number}"), range(6)))
    assert len({device.path for device in devices}) == 6
    assert len(started) == 1
    assert clean_up(service).in_use == []
    assert not service.run_dir.path.exists() or list(service.run_dir.path.iterdir()) == []


@kernel
def test_a_device_without_directory_makes_no_run_directory(service: DeviceService, tmp_path: Path) -> None:
    device = service.attach(golden_config(tmp_path), "x")
    kill(host_process(service).pid)
    away = service.run_dir.path.with_name("away")
    service.run_dir.path.rename(away)
    try:
        kill(device.keeper_pid)
        until(lambda: "no keeper yet" in (away / "host.log").read_text())
        assert not service.run_dir.path.exists()
    finally:
        away.rename(service.run_dir.path)
    assert whole(service).pid == device.pid


def test_deaths_in_a_row_are_given_up_and_a_healthy_server_begins_again() -> None:
    counted = Deaths(give_up_after_s=3600.0)
    pauses = []
    for _ in range(MAX_DEATHS - 1):
        assert counted.count(reported=False) == ""
        pauses.append(counted.pause_s)
    assert pauses[:4] == [0.0, 0.2, 0.4, 0.8]
    assert max(pauses) == 2.0
    counted.forget()
    assert counted.count(reported=False) == ""
    assert counted.pause_s == 0.0
    for _ in range(MAX_DEATHS - 2):
        counted.count(reported=False)
    assert counted.count(reported=False).startswith(f"{MAX_DEATHS} servers in ")


def test_a_reported_cause_is_borne_for_a_while_only() -> None:
    counted = Deaths(give_up_after_s=0.05)
    assert counted.count(reported=True) == ""
    time.sleep(0.06)
    assert counted.count(reported=True).startswith("2 servers in 0.")


@pytest.mark.parametrize(
    ("completed", "killed_by", "oom_kills", "lived_s", "healthy"),
    [
        (6, signal.SIGKILL, 3, 0.0, True),
        (6, None, 3, 0.0, True),
        (5, signal.SIGKILL, 3, 0.0, False),  # nothing was answered meanwhile
        (6, signal.SIGSEGV, 3, 0.0, False),  # its own fault
        (6, 0, 3, 0.0, False),
        (6, signal.SIGKILL, 4, 0.0, False),  # for want of memory
        (5, signal.SIGSEGV, 3, 1.0, True),
    ],
)
def test_what_makes_a_death_no_fault_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
    completed: int,
    killed_by: int | None,
    oom_kills: int,
    lived_s: float,
    healthy: bool,
) -> None:
    start = Start(completed=5, oom_kills=3, at_s=time.monotonic() - lived_s)
    monkeypatch.setattr(deaths.Activity, "of", lambda _: Activity(0, completed))
    monkeypatch.setattr(deaths, "_oom_kills", lambda: oom_kills)
    assert start.was_healthy(Path("/dev/loop0"), killed_by) is healthy


def test_a_device_whose_requests_are_not_counted_needs_time() -> None:
    start = Start.now(Path("/dev/null"))
    assert start.completed == -1
    assert not start.was_healthy(Path("/dev/null"), signal.SIGKILL)


@pytest.fixture
def channel() -> Iterator[tuple[ServerProcess, socket.socket]]:
    """A server process as its keeper has it, and its end of the channel."""
    ours, theirs = socket.socketpair()
    with theirs, subprocess.Popen(["sleep", "1000"]) as process:
        one = ServerProcess(process.pid, ours, 0)
        yield one, theirs
        one.kill()
        process.wait(30)
        assert one.bury() is None  # not its child any more


def test_a_server_that_dies_with_its_adoption_unread_is_no_error(
    channel: tuple[ServerProcess, socket.socket],
) -> None:
    one, theirs = channel
    theirs.sendall(b'{"busy": true}\n')
    one.channel.sendall(b'{"kept": true}\n')
    assert one.listen() == [Busy(busy=True)]
    theirs.close()
    assert one.listen() is None
    assert one.last_messages() == []


@pytest.mark.parametrize(
    "sent", [b"busy\n", b"[1]\n", b'{"a": 1}\n7\n', b"[" * 100_000 + b"\n", b"\xff\n", b"x" * (9 << 20)]
)
def test_a_channel_with_malformed_messages_is_not_read_any_more(
    channel: tuple[ServerProcess, socket.socket], sent: bytes
) -> None:
    one, theirs = channel
    sender = threading.Thread(target=_send_until_closed, args=(theirs, sent))
    sender.start()
    try:
        while (messages := one.listen()) is not None:
            assert messages == []
    finally:
        one.channel.shutdown(socket.SHUT_RDWR)
        sender.join(30)
    assert len(one._lines) <= 2 << 20


def _send_until_closed(channel: socket.socket, data: bytes) -> None:
    try:
        channel.sendall(data)
    except OSError:
        pass


def test_the_peer_of_a_socket_is_known() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert wire.peer_of(one) == (os.getpid(), os.getuid(), os.getgid())
