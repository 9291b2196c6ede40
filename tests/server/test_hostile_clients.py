"""Clients of the host's and the servers' sockets that send nonsense, too much, too slowly, or descriptors."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obdlab.blob import MemoryBlob
from obdlab.devices.device import DeviceStatistics
from obdlab.errors import DeviceError
from obdlab.server import controlclient, controlsocket, wire
from obdlab.server.cleanup import clean_up
from obdlab.server.client import AttachedDevice, DeviceService
from obdlab.server.controlclient import CONTROL_NAME
from obdlab.server.host import MAX_REQUESTS
from obdlab.server.hostrequests import REQUEST_TIMEOUT_S
from obdlab.server.messages import Done, Failed, GetStatistics, Graduate, ServerStatistics
from obdlab.server.rundir import SOCKET_NAME, DeviceRecord
from obdlab.settings.settings import Settings
from tests.devices.contract import MIB, read_direct
from tests.server.bed import start_host
from tests.server.hosting import content_of
from tests.server.killing import until

kernel = pytest.mark.kernel
SOCKETS = ("host", "control")


class Bed:
    """A host with one device."""

    def __init__(self, tmp_path: Path) -> None:
        self.run_dir = tmp_path.resolve() / "run"
        self.process = start_host(self.run_dir)
        self.service = DeviceService(self.run_dir, Settings())
        self.config = tmp_path / "a.json"
        self.config.write_text(json.dumps({"seed": 1}))
        self.device: AttachedDevice = self.service.attach(self.config, "a")

    def place(self, which: str) -> tuple[Path, int]:
        """A socket, and the process that listens there."""
        if which == "host":
            return self.run_dir / SOCKET_NAME, self.process.pid
        return self.run_dir / "devices" / "a" / CONTROL_NAME, self.device.pid

    def check(self) -> None:
        """The device is what it was, and the host takes requests."""
        assert read_direct(self.device.path, 0, MIB) == content_of({"seed": 1})
        assert self.service.statistics("a")["errors"] == 0
        again = self.service.attach(self.config, "a")
        assert (again.pid, again.keeper_pid) == (self.device.pid, self.device.keeper_pid)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path)
    try:
        yield made
    finally:
        clean_up(made.service, force=True)
        made.process.kill()
        made.process.wait(60)
        assert made.process.stdout is not None
        made.process.stdout.close()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@kernel
@pytest.mark.parametrize("which", SOCKETS)
def test_malformed_messages_are_answered_with_an_error(bed: Bed, which: str) -> None:
    place, _ = bed.place(which)
    for line in (
        b"[" * 200_000,
        b'{"op": ' + b"9" * 5000 + b"}",
        b'{"op": ["attach"]}',
        b'{"op": {}}',
        b'{"op": null}',
        b'{"op": "\\u0000"}',
        b'\xff\xfe{"op": "attach"}',
        b'"attach"',
        b"NaN",
    ):
        with wire.connect(place, 30.0) as connection:
            connection.sendall(line + b"\n")
            assert isinstance(wire.receive(connection, 30.0, (Failed,)), Failed), line[:40]
    bed.check()


@kernel
@pytest.mark.parametrize("which", SOCKETS)
def test_a_message_without_end_is_hung_up_on(bed: Bed, which: str) -> None:
    place, _ = bed.place(which)
    sent, code = 0, None
    with wire.connect(place, 30.0) as connection:
        try:
            while sent < 64 * MIB:
                sent += connection.send(b"x" * 65536)
        except OSError as error:
            code = error.errno
    assert code in (errno.EPIPE, errno.ECONNRESET)
    assert sent < 4 * MIB
    bed.check()


@kernel
@pytest.mark.parametrize("which", SOCKETS)
def test_descriptors_that_nobody_wants_are_closed(bed: Bed, which: str) -> None:
    place, pid = bed.place(which)
    before = descriptors(pid)
    for _ in range(20):
        reader, writer = os.pipe()
        with wire.connect(place, 30.0) as connection:
            socket.send_fds(connection, [b'{"op": "nothing"}\n'], [writer] * 100)
            os.close(writer)
            answer = wire.receive(connection, 30.0, (Failed,))
            assert isinstance(answer, Failed)
            assert answer.error == "unknown request (got 'nothing')"
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b""  # the last writer's end is closed
        os.close(reader)
    until(lambda: descriptors(pid) <= before)
    bed.check()


@kernel
@pytest.mark.parametrize("which", SOCKETS)
def test_clients_that_go_in_the_middle_leave_nothing(bed: Bed, which: str) -> None:
    place, pid = bed.place(which)
    before, processes = descriptors(pid), children(pid)
    for number in range(60):
        with wire.connect(place, 30.0) as connection:
            connection.sendall((b"", b'{"op": "stat', b'{"op": "statistics"}\n', b'{"op": "upgrade"}\n')[number % 4])
    until(lambda: descriptors(pid) <= before and children(pid) <= processes, timeout_s=60.0)
    bed.check()


@kernel
def test_clients_that_say_nothing_hold_up_the_host_for_a_while_only(bed: Bed) -> None:
    place, pid = bed.place("host")
    with ExitStack() as held:
        for _ in range(MAX_REQUESTS + 20):
            held.enter_context(wire.connect(place, 30.0))
        until(lambda: children(pid) >= MAX_REQUESTS)
        assert children(pid) <= MAX_REQUESTS + 8  # and the keepers that it has inherited
        begun = time.monotonic()
        bed.check()
        assert time.monotonic() - begun < 3 * REQUEST_TIMEOUT_S + 30.0


@kernel
def test_clients_that_say_nothing_hold_up_a_server_for_a_while_only(bed: Bed) -> None:
    place, _ = bed.place("control")
    with ExitStack() as held:
        for _ in range(20):
            held.enter_context(wire.connect(place, 30.0))
        assert controlclient.ask(place.parent, GetStatistics(), ServerStatistics, silence_s=60.0).errors == 0
    bed.check()


@kernel
def test_a_timeout_that_is_no_time_is_refused(bed: Bed) -> None:
    """Compared with NaN no deadline ever passes."""
    request = {"device_id": "a", "config": str(bed.config), "config_sha256": "", "settings": "{}", "image": {}}
    for op in ("attach", "upgrade", "prime"):
        for time_s, message in ((float("nan"), "a message that is no JSON"), (-1, f"{op} request: .*timeout_s")):
            with wire.connect(bed.run_dir / SOCKET_NAME, 30.0) as connection:
                line = json.dumps(request | {"op": op, "readahead_kib": 128, "timeout_s": time_s})
                connection.sendall(line.encode() + b"\n")
                answer = wire.receive(connection, 30.0, (Failed,))
            assert isinstance(answer, Failed)
            assert re.match(message, answer.error)


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    """128 clients at once must not make the next one believe that there is no host."""
    listener = wire.listen(tmp_path / "s.sock")
    with listener, ExitStack() as held:
        listener.listen(1)
        for _ in range(2):
            held.enter_context(wire.connect(tmp_path / "s.sock", 30.0))
        with pytest.raises(TimeoutError, match="its queue is full"):
            wire.connect(tmp_path / "s.sock", 0.1)
        taken: list[socket.socket] = []
        accepting = threading.Timer(0.3, lambda: taken.append(listener.accept()[0]))
        accepting.start()
        with wire.connect(tmp_path / "s.sock", 30.0) as late:
            assert late.gettimeout() == 30.0
        accepting.join(30)
        taken[0].close()


class Failing:
    """A listener that fails once, as for want of descriptors."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.failed = threading.Event()

    def accept(self) -> tuple[socket.socket, object]:
        if not self.failed.is_set():
            self.failed.set()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._listener.accept()


def test_a_server_short_of_descriptors_answers_again(tmp_path: Path) -> None:
    """Else it would be silent for good, and be killed as one that hangs."""
    blob = MemoryBlob(bytes(4096))
    served = controlsocket.Control(None, blob, tmp_path, with_helpers=False)  # type: ignore[arg-type]
    listener = Failing(wire.listen(tmp_path / CONTROL_NAME))
    served.start(listener)  # type: ignore[arg-type]
    assert listener.failed.wait(30)
    with pytest.raises(DeviceError, match=r"request that this process does not answer \(got Graduate\)"):
        controlclient.ask(tmp_path, Graduate(""), Done, silence_s=30.0)


def test_a_silent_helper_keeps_its_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the socket the helper would be missing in traces, and be killed as one that hangs."""
    counters = DeviceStatistics(1, 512, 0, 0, 0, 0.5, 1, "")
    device: Any = SimpleNamespace(statistics=lambda: counters)
    served = controlsocket.Control(device, MemoryBlob(bytes(4096)), tmp_path, with_helpers=False)
    served._with_helpers = True
    silent, ended = tmp_path / "helper-1.sock", tmp_path / "helper-2.sock"
    wire.listen(ended).close()
    with wire.listen(silent):
        assert served._statistics(GetStatistics(), print).reads == 1
    assert silent.exists()
    assert not ended.exists()
    assert "helper-1.sock: " in caplog.text
    assert "no answer within 1 s" in caplog.text
    assert "helper-2.sock: " not in caplog.text


def test_a_record_of_a_later_version_is_read(tmp_path: Path) -> None:
    known = {"device_id": "a", "config": "/c", "config_sha256": "", "path": "/dev/loop9", "size": 4096}
    known |= {"read_only": True, "pid": 1, "start_time": 2, "of_a_later_version": {"x": 1}}
    (tmp_path / "disk.json").write_text(json.dumps(known))
    record = DeviceRecord.load(tmp_path)
    assert record is not None
    assert (record.path, record.starting, record.keeper) == ("/dev/loop9", None, None)
    for text in ("[]", "7", "{}", "{"):
        (tmp_path / "disk.json").write_text(text)
        assert DeviceRecord.load(tmp_path) is None
