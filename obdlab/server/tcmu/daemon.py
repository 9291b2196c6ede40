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
            if self._netlink.fileno() in ready:
                for event in self._netlink.events():
                    self._on_event(event)
            for server in list(self._servers.values()):
                if server.reader in ready:
                    self._on_report(server)
                if server.pidfd in ready:
                    self._on_death(server)
            for pidfd in ready & self._watched.keys():
                self._on_stranger_gone(pidfd)
            self._look_at_clock()
        self._end()

    # --- events ---

    def _on_event(self, event: Event) -> None:
        log.info("%s %s (uio%d)", event.what.name.lower(), event.name, event.number)
        name = uio.UioName.parse(event.name)
        if event.what == What.REMOVED:
            self._remove(event)
        elif event.what == What.RECONFIGURED:
            self._netlink.reply(event, -errno.EOPNOTSUPP)
        elif name is not None and name.handler == HANDLER:
            self._start(event.number, name, event)
        elif name is None or name.handler != "obdlab":  # obdlab serves its own devices and waits for no reply
            log.error("%s: no handler for it", event.name)
            self._netlink.reply(event, -errno.ENOENT)

    # Replies once the server has closed the image, so that the process that removed the device may use the image
    # again at once. (Touches nothing in configfs meanwhile: the kernel holds its directory until the reply.)
    def _remove(self, event: Event) -> None:
        for server in self._servers.values():
            if server.number == event.number and server.ready_at is not None:
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

    def _on_death(self, server: _Server) -> None:
        if server.reader >= 0:
            self._on_report(server)
        _, status = os.waitpid(server.pid, 0)
        self._forget(server)
        code = os.waitstatus_to_exitcode(status)
        if server.removal is not None:
            self._netlink.reply(server.removal, 0)
        elif server.event is not None:
            reason = server.failed.error if server.failed else f"its server died (status {code})"
            log.error("%s: not added: %s", server.name.device, reason)
            report_failure(image_of(server.name.config)[0], reason)
            self._answer(server, -errno.ENOENT)
        elif server.failed is not None and issubclass(of_code(server.failed.code), DeviceBusyError):
            self._watch_strangers(server)
        elif code != 0 and self._is_unserved(server.number, server.name):
            self._start_again(server, code)

    # UIO numbers are reused: this one may be a new device's by now, which has an event of its own.
    def _is_unserved(self, number: int, name: UioName | None = None) -> bool:
        now = uio.devices().get(number)
        if now is None or now.handler != HANDLER or (name is not None and now != name) or not now.is_configured:
            return False
        return all(server.number != number for server in self._servers.values())

    # The server was killed, or ended without its device: the device must not hang in either case.
    def _start_again(self, server: _Server, code: int) -> None:
        healthy = server.ready_at is not None and time.monotonic() - server.ready_at > _HEALTHY_S
        deaths = 1 if healthy else server.deaths + 1
        pause_s = backoff_s(deaths - 1, _RESTART_FIRST_S, _RESTART_MOST_S)
        log.error("%s: its server died (status %d), another one in %g s", server.name.device, code, pause_s)
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
                if self._is_unserved(number):
                    self._start(number, uio.devices()[number], None, deaths)
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

    def _end(self) -> None:
        for server in self._servers.values():
            os.kill(server.pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_S
        for server in list(self._servers.values()):
            poller = select.poll()
            poller.register(server.pidfd, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                log.warning("%s: its server still waits for a source, and goes on", server.name.device)
                continue
            os.waitpid(server.pid, 0)
            self._forget(server)
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
