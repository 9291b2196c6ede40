"""The TCMU daemon: serves the images of overlaybd backstores that a snapshotter or an attacher makes in configfs.

A drop-in for overlaybd-tcmu. One process with one thread listens to the kernel and forks a server per device. A
server outlives the daemon, and is replaced when it dies. The kernel's dev_config names an image's config.v1.json. No
other state is kept: a new daemon takes over the devices it finds.

It supervises servers as a keeper does, with the same pieces (forking, messages, back-off) but another policy: the
kernel itself keeps these devices and waits for an answer to each event, so no device is ever given up.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices.tcmu import netlink, uio
from obdlab.devices.tcmu.netlink import Event, TcmuNetlink, What
from obdlab.devices.tcmu.uio import DeviceBusyError
from obdlab.errors import of_code
from obdlab.server import wire
from obdlab.server.forking import Signals, fork_to
from obdlab.server.messages import OF_KEEPER, Failed
from obdlab.server.tcmu.devconfig import HANDLER, image_of, report_failure
from obdlab.server.tcmu.server import Reporter, serve
from obdlab.system.pauses import backoff_s

if TYPE_CHECKING:
    from obdlab.devices.tcmu.uio import UioName
    from obdlab.settings.settings import Settings

log = logging.getLogger(__name__)

_RESTART_FIRST_S, _RESTART_MOST_S = 0.05, 30.0
#: A server that has served this long did not die at once.
_HEALTHY_S = 5.0
#: An opening has its own deadline; a server that exceeds it is killed.
_OPEN_GRACE_S = 10.0
_END_S = 30.0
_DAEMON_ENDS = "the daemon ends"


@dataclass(slots=True, eq=False)
class _Server:
    number: int
    name: UioName
    pidfd: int
    pid: int
    reader: int
    deadline: float
    event: Event | None
    deaths: int
    ready_at: float | None = None
    failed: Failed | None = None
    removal: Event | None = None
    lines: wire.Lines = field(default_factory=wire.Lines)


class TcmuDaemon:
    """Serves all overlaybd TCMU devices of this host. Raises DeviceError if the kernel has no TCMU."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servers: dict[int, _Server] = {}
        self._watched: dict[int, int] = {}
        self._waiting: dict[int, tuple[float, int]] = {}
        self._poll = select.poll()
        self._ending = False
        # While the kernel's netlink is blocked, no device can be added that would be seen twice or missed.
        blocked = netlink.block()
        try:
            self._netlink = TcmuNetlink()
            self._poll.register(self._netlink, select.POLLIN)
            for number, name in uio.devices().items():
                if name.handler == HANDLER and name.is_configured:
                    log.info("%s (uio%d): found, taking it over", name.device, number)
                    self._start(number, name, None)
        finally:
            if blocked:
                netlink.unblock()

    def run(self, signals: Signals) -> None:
        """Serve until SIGINT or SIGTERM; then finish pending answers and leave the devices waiting.

        Their users wait, without an error, for the daemon that takes them over.
        """
        self._poll.register(signals, select.POLLIN)
        while True:
            ready = {fd for fd, _ in self._poll.poll(self._pause_ms())}
            if signals.fileno() in ready and signals.come() & {signal.SIGINT, signal.SIGTERM}:
                break
            self._handle(ready)
            self._look_at_clock()
        self._poll.unregister(signals)
        self._end()

    def _handle(self, ready: set[int]) -> None:
        # Before any descriptor is closed: the next one that is opened gets its number, which is among the ready ones.
        servers, strangers = list(self._servers.values()), ready & self._watched.keys()
        if self._netlink.fileno() in ready:
            self._take_events()
        for server in servers:
            if server.reader in ready:
                self._on_report(server)
            if server.pidfd in ready:
                self._on_death(server)
        for pidfd in strangers:
            self._on_stranger_gone(pidfd)

    # --- events ---

    def _take_events(self) -> None:
        for event in self._netlink.events():
            self._on_event(event)

    def _on_event(self, event: Event) -> None:
        log.info("%s %s (uio%d)", event.what.name.lower(), event.name, event.number)
        name = uio.UioName.parse(event.name)
        if event.what == What.REMOVED:
            self._remove(event)
        elif event.what == What.RECONFIGURED:
            self._netlink.reply(event, -errno.EOPNOTSUPP)
        elif name is not None and name.handler == HANDLER:
            if self._ending:
                self._refuse(event, name, _DAEMON_ENDS)
            else:
                self._start(event.number, name, event)
        elif name is None or name.handler != "obdlab":  # obdlab serves its own devices and waits for no reply
            log.error("%s: no handler for it", event.name)
            self._netlink.reply(event, -errno.ENOENT)

    # Replies once the server has closed the image, so that the process that removed the device may use the image
    # again at once. (Touches nothing in configfs meanwhile: the kernel holds its directory until the reply.)
    # A daemon that ends replies at once: its servers are ending, for which they use that directory.
    def _remove(self, event: Event) -> None:
        for server in self._servers.values():
            if server.number == event.number and server.ready_at is not None and not self._ending:
                server.removal, server.deadline = event, time.monotonic() + _END_S
                os.kill(server.pid, signal.SIGUSR1)
                return
        self._netlink.reply(event, 0)

    def _start(self, number: int, name: UioName, event: Event | None, deaths: int = 0) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            pid = fork_to(lambda: self._become_server(number, name, event is None, writer))
        except OSError as error:
            os.close(reader)
            log.error("%s: cannot fork: %s", name.device, error.strerror)
            if event is not None:
                self._netlink.reply(event, -errno.ENOENT)
            else:
                self._waiting[number] = (time.monotonic() + _RESTART_MOST_S, deaths)
            return
        finally:
            os.close(writer)
        deadline = time.monotonic() + self._settings.open_deadline_s + _OPEN_GRACE_S
        pidfd = os.pidfd_open(pid)
        self._servers[pid] = _Server(number, name, pidfd, pid, reader, deadline, event, deaths)
        self._poll.register(reader, select.POLLIN)
        self._poll.register(pidfd, select.POLLIN)

    def _become_server(self, number: int, name: UioName, adopt: bool, writer: int) -> None:
        self._netlink.close()  # another listener that never reads would only fill up
        for server in self._servers.values():
            if server.reader >= 0:
                os.close(server.reader)
            os.close(server.pidfd)
        path, _ = image_of(name.config)
        serve(number, name, path, self._settings, Reporter(writer), adopt=adopt)

    def _on_report(self, server: _Server) -> None:
        data = os.read(server.reader, 1 << 16)
        if not data:
            self._poll.unregister(server.reader)
            os.close(server.reader)
            server.reader = -1
            return
        server.lines.add(data)
        while (line := server.lines.take()) is not None:
            message = wire.decode(line, OF_KEEPER)
            if isinstance(message, Failed):
                server.failed = message
            else:
                server.ready_at = time.monotonic()
                how = "taken over" if server.event is None else "added"
                log.info("%s: %s, served by process %d", server.name.device, how, server.pid)
                self._answer(server, 0)

    def _answer(self, server: _Server, status: int) -> None:
        if server.event is not None:
            self._netlink.reply(server.event, status)
            server.event = None

    def _refuse(self, event: Event, name: UioName, reason: str) -> None:
        log.error("%s: not added: %s", name.device, reason)
        report_failure(image_of(name.config)[0], reason)
        self._netlink.reply(event, -errno.ENOENT)

    def _on_death(self, server: _Server) -> None:
        if server.reader >= 0:
            self._on_report(server)
        _, status = os.waitpid(server.pid, 0)
        self._forget(server)
        code = os.waitstatus_to_exitcode(status)
        reason = server.failed.error if server.failed else f"its server ended (status {code})"
        if server.removal is not None:
            self._netlink.reply(server.removal, 0)
        elif server.event is not None:
            self._refuse(server.event, server.name, reason)
        elif self._ending:
            return
        elif server.failed is not None and issubclass(of_code(server.failed.code), DeviceBusyError):
            self._watch_strangers(server)
        elif self._unserved(server.number, server.name) is not None:
            self._start_again(server, reason)

    # Returns the name of the device if it is there and has no server. UIO numbers are reused: this one may be a new
    # device's by now, which has an event of its own.
    def _unserved(self, number: int, name: UioName | None = None) -> UioName | None:
        now = uio.devices().get(number)
        if now is None or now.handler != HANDLER or (name is not None and now != name):
            return None
        # If the device is being removed, reading its directory waits until the kernel has the reply to that event.
        self._take_events()
        if any(server.number == number for server in self._servers.values()) or not now.is_configured:
            return None
        return now

    # The server was killed, could not open its device, or ended without it: the device must not hang in any case.
    def _start_again(self, server: _Server, reason: str) -> None:
        healthy = server.ready_at is not None and time.monotonic() - server.ready_at > _HEALTHY_S
        deaths = 1 if healthy else server.deaths + 1
        pause_s = backoff_s(deaths - 1, _RESTART_FIRST_S, _RESTART_MOST_S)
        log.error("%s: %s; another server in %g s", server.name.device, reason, pause_s)
        self._waiting[server.number] = (time.monotonic() + pause_s, deaths)

    # A server of an earlier daemon goes on serving; when it dies, the device is taken over.
    def _watch_strangers(self, server: _Server) -> None:
        for pid in holders(server.number):
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                self._watched[pidfd] = server.number
                self._poll.register(pidfd, select.POLLIN)
                log.info("%s: served by process %d", server.name.device, pid)
                return
        self._waiting[server.number] = (time.monotonic() + _RESTART_FIRST_S, 0)

    def _on_stranger_gone(self, pidfd: int) -> None:
        number = self._watched.pop(pidfd)
        log.warning("uio%d: the process that served it is gone, taking it over", number)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        self._waiting[number] = (0.0, 0)

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        for number, (when, deaths) in list(self._waiting.items()):
            if when <= now:
                del self._waiting[number]
                if (name := self._unserved(number)) is not None:
                    self._start(number, name, None, deaths)
        for server in self._servers.values():
            if (server.ready_at is None or server.removal is not None) and server.deadline <= now:
                server.failed = server.failed or Failed("opening the image took too long")
                server.deadline = now + _OPEN_GRACE_S
                os.kill(server.pid, signal.SIGKILL)

    def _pause_ms(self) -> float | None:
        times = [when for when, _ in self._waiting.values()]
        times += [
            each.deadline for each in self._servers.values() if each.ready_at is None or each.removal is not None
        ]
        return max(0.0, (min(times) - time.monotonic()) * 1000) + 1 if times else None

    def _forget(self, server: _Server) -> None:
        del self._servers[server.pid]
        self._poll.unregister(server.pidfd)
        os.close(server.pidfd)
        if server.reader >= 0:
            self._poll.unregister(server.reader)
            os.close(server.reader)

    # Leaves no event without a reply: its process, which makes or removes the device, could not even be killed.
    def _end(self) -> None:
        self._ending = True
        for server in self._servers.values():
            os.kill(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_S
        while self._servers and (left_s := deadline - time.monotonic()) > 0:
            self._handle({fd for fd, _ in self._poll.poll(left_s * 1000)})
        for server in self._servers.values():
            if server.event is not None or server.removal is not None:
                os.kill(server.pid, signal.SIGKILL)
            if server.removal is not None:
                self._netlink.reply(server.removal, 0)
            elif server.event is not None:
                self._refuse(server.event, server.name, _DAEMON_ENDS)
            else:
                log.warning("%s: its server still waits for a source, and goes on", server.name.device)
        self._take_events()
        self._netlink.close()


def holders(number: int) -> list[int]:
    """Return the processes that have a UIO device open."""
    node, found = f"/dev/uio{number}", []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == node:
                found.append(int(link.parts[2]))
        except OSError:  # closed meanwhile
            continue
    return found
