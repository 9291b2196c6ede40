"""The TCMU daemon's steps, on a kernel that is simulated: deaths of servers, removals, the daemon's own end."""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from obdlab.devices.tcmu import netlink, uio
from obdlab.devices.tcmu.netlink import Event, What
from obdlab.devices.tcmu.uio import DeviceBusyError, UioName
from obdlab.server import wire
from obdlab.server.messages import Failed, Ready
from obdlab.server.tcmu import daemon as daemon_module
from obdlab.server.tcmu.daemon import TcmuDaemon, _Server
from obdlab.server.tcmu.devconfig import HANDLER
from obdlab.settings.settings import Settings


class Kernel:
    """The kernel's netlink, its UIO devices and their configfs."""

    def __init__(self) -> None:
        self._readable = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._queued: list[Event] = []
        self.replies: list[tuple[Event, int]] = []
        self.devices: dict[int, UioName] = {}
        #: The number of replies before each look at a device's directory.
        self.looks: list[int] = []
        self.closed = False

    def fileno(self) -> int:
        return self._readable

    def queue(self, event: Event) -> None:
        self._queued.append(event)
        os.eventfd_write(self._readable, 1)

    def events(self) -> list[Event]:
        with suppress(BlockingIOError):
            os.eventfd_read(self._readable)
        found, self._queued = self._queued, []
        return found

    def reply(self, event: Event, status: int) -> None:
        assert not self.closed
        self.replies.append((event, status))

    def close(self) -> None:
        self.closed = True

    def end(self) -> None:
        os.close(self._readable)


class Bed:
    """A daemon with servers that are other programs."""

    def __init__(self, kernel: Kernel, directory: Path) -> None:
        self.kernel = kernel
        self.daemon = TcmuDaemon(Settings())
        self._directory = directory
        self._pids: list[int] = []

    def name(self, number: int) -> UioName:
        (self._directory / f"{number}").mkdir(exist_ok=True)
        return UioName("1", f"dev_{number}", HANDLER, str(self._directory / f"{number}/config.v1.json"))

    def event(self, what: What, number: int) -> Event:
        name = self.name(number)
        return Event(what, f"tcm-user/{name.hba}/{name.device}/{name.handler}/{name.config}", number, 100 + number)

    def reason(self, number: int) -> str:
        """Return what the maker of a device finds in its result file."""
        return (self._directory / f"{number}/init-debug.log").read_text()

    def process(self, *command: str, deaf: bool = False) -> int:
        """Start a program, which SIGTERM does not end if it is ``deaf``."""
        blocked = [signal.SIGTERM] if deaf else []
        self._pids.append(os.posix_spawnp(command[0], command, os.environ, setsigmask=blocked))
        return self._pids[-1]

    def server(
        self,
        number: int,
        *command: str,
        report: Ready | Failed | None = None,
        event: Event | None = None,
        deaf: bool = False,
    ) -> _Server:
        """Add a server whose process runs ``command``, with its report on the way."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        if report is not None:
            os.write(writer, wire.encode(report))
        os.close(writer)
        pid = self.process(*command, deaf=deaf)
        server = _Server(number, self.name(number), os.pidfd_open(pid), pid, reader, 0.0, event, 0)
        self.daemon._servers[pid] = server
        self.daemon._poll.register(reader, select.POLLIN)
        self.daemon._poll.register(server.pidfd, select.POLLIN)
        return server

    def wait_for_end(self, server: _Server) -> None:
        """Wait until a server's process has ended; the daemon does not know yet."""
        poller = select.poll()
        poller.register(server.pidfd, select.POLLIN)
        assert poller.poll(60_000)

    def turn(self) -> None:
        """Have the daemon do what it finds to do."""
        self.daemon._handle({fd for fd, _ in self.daemon._poll.poll(0)})

    def end(self) -> None:
        for pid in self._pids:
            with suppress(ChildProcessError, ProcessLookupError):  # the daemon has had its status
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        for server in self.daemon._servers.values():
            os.close(server.pidfd)
            if server.reader >= 0:
                os.close(server.reader)


@pytest.fixture
def bed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    kernel = Kernel()

    def is_configured(name: UioName) -> bool:
        kernel.looks.append(len(kernel.replies))
        return name in kernel.devices.values()

    monkeypatch.setattr(netlink, "block", lambda: False)
    monkeypatch.setattr(daemon_module, "TcmuNetlink", lambda: kernel)
    monkeypatch.setattr(uio, "devices", lambda: dict(kernel.devices))
    monkeypatch.setattr(UioName, "is_configured", property(is_configured))
    made = Bed(kernel, tmp_path)
    yield made
    made.end()
    kernel.end()


@pytest.mark.parametrize(
    ("command", "report", "reason"),
    [
        ("true", Failed("no memory left"), "no memory left"),
        ("false", None, "its server ended (status 1)"),
        ("true", Ready(None), "its server ended (status 0)"),  # by an operator's SIGTERM
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_device_whose_server_ends_gets_another_one(
    bed: Bed,
    caplog: pytest.LogCaptureFixture,
    command: str,
    report: Ready | Failed | None,
    reason: str,
    *,
    there: bool,
) -> None:
    if there:
        bed.kernel.devices[7] = bed.name(7)
    server = bed.server(7, command, report=report)
    bed.wait_for_end(server)
    bed.turn()
    assert bed.daemon._servers == {}
    assert list(bed.daemon._waiting) == ([7] if there else [])
    assert (f"dev_7: {reason}; another server in 0.05 s" in caplog.text) is there


def test_a_device_of_another_daemons_server_is_watched(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch's descriptor gets the number of one that was ready in the same turn."""
    bed.kernel.devices[7] = bed.name(7)
    stranger = bed.process("sleep", "600")
    monkeypatch.setattr(daemon_module, "holders", lambda _: [stranger])
    server = bed.server(7, "true", report=Failed.of(DeviceBusyError("served by another process")))
    bed.wait_for_end(server)
    bed.turn()
    assert list(bed.daemon._watched.values()) == [7]
    assert bed.daemon._waiting == {}
    os.kill(stranger, signal.SIGKILL)
    (watch,) = bed.daemon._watched
    poller = select.poll()
    poller.register(watch, select.POLLIN)
    assert poller.poll(60_000)
    bed.turn()
    assert bed.daemon._watched == {}
    assert list(bed.daemon._waiting) == [7]


def test_a_device_that_goes_while_it_is_looked_at_does_no_harm(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    name = bed.name(7)
    started: list[object] = []
    listings: list[Mapping[int, UioName]] = [{7: name}]
    bed.kernel.devices[7] = name
    monkeypatch.setattr(uio, "devices", lambda: listings.pop() if listings else {})
    monkeypatch.setattr(bed.daemon, "_start", lambda *args: started.append(args))
    bed.daemon._waiting = {7: (0.0, 3), 8: (0.0, 0)}
    bed.daemon._look_at_clock()
    assert started == [(7, name, None, 3)]
    assert bed.daemon._waiting == {}


def test_a_removal_has_its_reply_before_the_devices_directory_is_read(bed: Bed) -> None:
    """The directory is locked until then."""
    bed.kernel.devices[7] = bed.name(7)
    removal = bed.event(What.REMOVED, 7)
    bed.kernel.queue(removal)
    assert bed.daemon._unserved(7) == bed.name(7)
    assert bed.kernel.replies == [(removal, 0)]
    assert bed.kernel.looks == [1]


def test_a_daemon_that_ends_replies_to_all_that_wait(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "_END_S", 1.0)
    for number in range(1, 7):
        bed.kernel.devices[number] = bed.name(number)
    added, removed, reconfigured = (list(map(bed.event, [what] * 20, range(20))) for what in What)
    bed.server(1, "sleep", "600", report=Ready(None), event=added[1])
    bed.server(2, "true", report=Failed("no layer"), event=added[2])
    bed.server(3, "sleep", "600", report=Ready(None)).removal = removed[3]
    opening = bed.server(4, "sleep", "600", event=added[4], deaf=True)
    removing = bed.server(5, "sleep", "600", report=Ready(None), deaf=True)
    removing.removal = removed[5]
    going_on = bed.server(6, "sleep", "600", report=Ready(None), deaf=True)
    for event in (added[11], removed[12], reconfigured[13], removed[6]):
        bed.kernel.queue(event)
    bed.daemon._end()
    assert dict(bed.kernel.replies) == {
        added[1]: 0,
        added[2]: -errno.ENOENT,
        removed[3]: 0,
        added[4]: -errno.ENOENT,
        removed[5]: 0,
        added[11]: -errno.ENOENT,
        removed[12]: 0,
        reconfigured[13]: -errno.EOPNOTSUPP,
        removed[6]: 0,
    }
    assert len(bed.kernel.replies) == 9
    assert bed.kernel.closed
    assert {number: bed.reason(number) for number in (2, 4, 11)} == {
        2: "failed:no layer",
        4: "failed:the daemon ends",
        11: "failed:the daemon ends",
    }
    # No device gets another server now. A process that serves goes on, one that opens or closes an image does not.
    assert bed.daemon._waiting == {}
    assert os.waitstatus_to_exitcode(os.waitpid(opening.pid, 0)[1]) == -signal.SIGKILL
    assert os.waitstatus_to_exitcode(os.waitpid(removing.pid, 0)[1]) == -signal.SIGKILL
    assert os.waitpid(going_on.pid, os.WNOHANG) == (0, 0)


def test_an_event_that_comes_while_servers_end_has_its_reply_at_once(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal of a device locks its directory, which its server uses in order to end."""
    server = bed.server(7, "sleep", "600", report=Ready(None), deaf=True)
    removal = bed.event(What.REMOVED, 7)

    def reply(event: Event, status: int) -> None:
        bed.kernel.replies.append((event, status))
        os.kill(server.pid, signal.SIGKILL)

    monkeypatch.setattr(bed.kernel, "reply", reply)
    bed.kernel.queue(removal)
    bed.daemon._end()
    assert bed.kernel.replies == [(removal, 0)]
    assert bed.daemon._servers == {}
