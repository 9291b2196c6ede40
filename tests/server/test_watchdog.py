"""Servers that hang are noticed and replaced; those that are slow, or that nobody waits for, are left alone."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import obdlab
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.observe import stacks
from obdlab.server import controlclient, watchdog
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.messages import Counters, GetCounters
from obdlab.server.watchdog import Activity, Watchdog
from obdlab.server.wire import NoAnswerError
from obdlab.settings.settings import Settings
from obdlab.system.processes import Process
from tests.devices.contract import MIB, read_direct
from tests.server.killing import until

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DeviceService]:
    settings = Settings(cache_dir=tmp_path / "cache", read_deadline_s=1.0, open_deadline_s=1.0)
    made = DeviceService(tmp_path.resolve() / "run", settings)
    yield made
    clean_up(made, force=True)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "golden.json"
    ImageConfig(lowers=tuple(LowerConfig(file=str(GOLDEN / f"layer{n}.obd")) for n in (1, 2))).save(path)
    return path


@pytest.mark.kernel
def test_host_keeper_and_server_write_their_stacks_while_the_device_is_read(
    service: DeviceService, config: Path
) -> None:
    device = service.attach(config, "x")
    wanted = read_direct(device.path, 0, 4 * MIB)
    host = json.loads((service.run_dir.path / "host.pid").read_text())["pid"]
    ended, wrong = threading.Event(), []

    def read() -> None:
        while not ended.is_set():
            wrong.extend([1] if read_direct(device.path, 0, len(wanted)) != wanted else [])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for dumped, pid in enumerate((host, device.keeper_pid, *[device.pid] * 30), 1):
            os.kill(pid, signal.SIGUSR2)
            until(lambda dumped=dumped: service.run_dir.host_log.read_text().count(stacks.TITLE) == dumped)
    finally:
        ended.set()
        reader.join(60)
    assert wrong == []
    (after,) = service.list()
    assert (after.pid, after.keeper_pid, after.restarts) == (device.pid, device.keeper_pid, 0)
    assert "fuse_loop.py:" in service.run_dir.host_log.read_text()


@pytest.mark.kernel
def test_a_server_that_hangs_is_replaced(service: DeviceService, config: Path) -> None:
    with obdlab.open_stack([GOLDEN / "layer1.obd", GOLDEN / "layer2.obd"]) as stack:
        wanted = stack.read_at(0, 8 * MIB)
    device = service.attach(config, "x")
    os.kill(device.pid, signal.SIGSTOP)
    until(lambda: is_stopped(device.pid))
    assert read_direct(device.path, 0, len(wanted)) == wanted
    assert Process.of(device.pid) is None
    until(lambda: service.list()[0].restarts == 1)
    assert "x: server 0 said nothing for 2 s while requests waited: killed" in service.run_dir.host_log.read_text()


@pytest.mark.kernel
@pytest.mark.slow
def test_servers_that_hang_one_after_another_are_given_up(service: DeviceService, config: Path) -> None:
    device = service.attach(config, "x")
    over = threading.Event()

    def stop_them_all() -> None:
        stopped: set[int] = set()
        while not over.wait(0.001):
            for pid in children_of(device.keeper_pid) - stopped:
                os.kill(pid, signal.SIGSTOP)
                stopped.add(pid)

    stopper = threading.Thread(target=stop_them_all)
    stopper.start()
    try:
        until(lambda: is_stopped(device.pid))
        with pytest.raises(OSError) as caught:
            read_direct(device.path, 0, MIB)
    finally:
        over.set()
        stopper.join(60)
    assert caught.value.errno == errno.EIO
    assert "x: given up after " in service.run_dir.host_log.read_text()


def children_of(pid: int) -> set[int]:
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T"


class Looks:
    """A watchdog whose looks cost no time, over a device and servers as a test says they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.activity: Activity | None = Activity(0, 0)
        self.answers: dict[str, object] = {}
        self.asked = 0
        self.watchdog = Watchdog(tmp_path, Settings(read_deadline_s=120.0))
        monkeypatch.setattr(Activity, "of", lambda _: self.activity)
        monkeypatch.setattr(controlclient, "ask", self.ask)
        monkeypatch.setattr(Watchdog, "pause_s", lambda _: 0.0)

    def ask(self, _: Path, request: object, kind: type, *, socket_name: str, silence_s: float) -> object:
        assert (request, kind, silence_s) == (GetCounters(), Counters, 1.0)
        self.asked += 1
        answer = self.answers[socket_name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def until_hung(self, servers: dict[int, int], looks: int = 100) -> tuple[int, dict[int, str]]:
        for number in range(1, looks + 1):
            found = self.watchdog.hung(Path("/dev/loop0"), servers)
            if found:
                return number, found
        return 0, {}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Looks:
    return Looks(monkeypatch, tmp_path)


SILENT = NoAnswerError("its server does not answer")
WAITING = Activity(1, 7)


def test_a_silent_server_hangs_once_every_read_would_have_ended(looks: Looks) -> None:
    looks.activity, looks.answers = WAITING, {"control.sock": SILENT}
    number, found = looks.until_hung({0: 1})
    assert (number - 1) * 16 < looks.watchdog.limit_s == 150 <= number * 16
    assert found == {0: "said nothing for 150 s while requests waited"}
    assert looks.until_hung({0: 1})[0] == number  # its successor has as much time
    assert looks.watchdog.hangs == 2
    looks.activity = Activity(1, 8)
    looks.until_hung({0: 1}, looks=1)
    assert looks.watchdog.hangs == 0


def test_an_idle_device_wakes_no_server(looks: Looks) -> None:
    assert looks.until_hung({0: 1}) == (0, {})
    looks.activity = None  # gone
    assert looks.until_hung({0: 1}) == (0, {})
    assert looks.asked == 0


def test_a_server_that_answers_may_be_slow(looks: Looks) -> None:
    looks.activity, looks.answers = WAITING, {"control.sock": Counters(under_way_s=(299.0, 1.0))}
    assert looks.until_hung({0: 1}) == (0, {})
    looks.answers["control.sock"] = Counters(under_way_s=(301.0,))
    assert looks.until_hung({0: 1}) == (1, {0: "has had a request for 301 s"})


def test_a_server_that_takes_no_requests_hangs(looks: Looks) -> None:
    looks.activity, looks.answers = WAITING, {"control.sock": Counters()}
    number, found = looks.until_hung({0: 1})
    assert (number, found) == (11, {0: "took none of the requests that waited for 150 s"})  # the first sees a change


def test_a_helper_that_hangs_is_found_while_others_work(looks: Looks) -> None:
    looks.answers = {"control.sock": Counters(under_way_s=(0.1,)), "helper-2.sock": SILENT}
    for completed in range(9):
        looks.activity = Activity(2, completed)
        assert looks.until_hung({0: 1, 2: 3}, looks=1) == (0, {})
    looks.activity = Activity(2, 10)
    assert looks.until_hung({0: 1, 2: 3}, looks=1) == (1, {2: "said nothing for 150 s while requests waited"})


def test_one_held_by_a_debugger_or_the_kernel_is_left_alone(
    looks: Looks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks.activity, looks.answers = WAITING, {"control.sock": SILENT}
    monkeypatch.setattr(watchdog, "_excuse_of", lambda _: "a debugger holds it")
    assert looks.until_hung({0: 1}, looks=25) == (0, {})
    assert [record.message.endswith("but a debugger holds it: it is left alone") for record in caplog.records] == [
        True,
        True,
    ]


def test_what_holds_a_process_is_seen() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            # On a busy disk it waits for its program's pages first.
            until(lambda: watchdog._excuse_of(sleeper.pid) == "")
        finally:
            sleeper.kill()
    assert watchdog._excuse_of(sleeper.pid) == ""
