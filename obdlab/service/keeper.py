"""The keeper of a device: holds its /dev/fuse connection, so that the device outlives its server.

A process per device that does nothing but wait: forked from the warmed host, it shares its memory. When a server
dies, whatever killed it, the keeper has the kernel hand out again what was not answered (Linux 6.9) and forks the
next one, which opens the image anew; users of the device see a pause. A server that hangs is killed
(``obdlab.service.watchdog``). It also forks helpers for a server that is short of processor time. A device whose
servers die again and again at once, or hang, or cannot open the image for the read deadline, is given up: the
connection is let go, and its users get I/O errors instead of waiting for ever.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.devices import abi, kinds
from obdlab.errors import DeviceError
from obdlab.image.config import read_config
from obdlab.image.settings import Settings
from obdlab.service import server
from obdlab.service.forking import Signals, become
from obdlab.service.rundir import TAKE_DOWN_SIGNAL, DeviceRecord, Plan, Process
from obdlab.service.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.service.takeover import Former

    Opener = Callable[[Path, str], Blob]

log = logging.getLogger(__name__)

_LEAVE_PAUSE_S = 1.0
#: A server that has served so long did not die "at once".
HEALTHY_S = 0.25
#: So many deaths at once in a row, and the device is given up.
MAX_DEATHS = 10
#: So many in a row that hung and answered nothing at all: likewise.
MAX_HANGS = 3
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_OOM_SCORE_ADJUST = "-1000"


@dataclass(slots=True, eq=False)
class _Server:
    pid: int
    pidfd: int
    channel: socket.socket
    #: 0: the one that made the device, or took its place; others help it.
    number: int
    ready_at: float | None = None
    error: str = ""
    received: bytearray = field(default_factory=bytearray)


class Keeper:
    """Keeps the device at ``directory`` going, from the fork of its first server to its end.

    What the servers say is passed on to ``tell``, a pipe, until the device is ready or has failed. With ``former``,
    the device is there already, and its servers are replaced.
    """

    def __init__(
        self, plan: Plan, directory: Path, opener: Opener, connection: int, tell: int, former: Former | None = None
    ) -> None:
        self._plan = plan
        self._directory = directory
        self._opener = opener
        self._connection = connection
        self._kind = kinds.find(plan.kind)
        self._leaving = False
        self._tell: int | None = tell
        self._former = former
        settings = Settings.from_json(plan.settings)
        self._give_up_after_s = settings.read_deadline_s
        self._most_servers = settings.server_processes or min(4, os.cpu_count() or 1)
        self._helper_settings = replace(settings, download_enabled=False).to_json()
        self._path = None if former is None else Path(former.record.path)
        self._servers: dict[int, _Server] = {}
        self._poller = select.poll()
        self._next_start: float | None = None
        self._failing_since = 0.0
        self._failures = 0
        self._deaths = 0
        self._restarts = 0 if former is None else former.record.restarts
        self._description: dict[str, Any] = {}
        self._watchdog = Watchdog(directory, settings)
        self._over = False
        self._signals: Signals | None = None

    def run(self) -> None:
        """Return when the device is gone, was given up, or needs no keeper."""
        _settle_in(self._directory.name)
        self._signals = Signals(TAKE_DOWN_SIGNAL)
        self._poller.register(self._signals, select.POLLIN)
        if self._tell is not None:
            self._poller.register(self._tell, 0)  # tells when nobody listens any more
        if self._former is not None:
            self._former.make_way()
        self._start(0)
        while not self._over and (self._servers or self._next_start is not None):
            self._wait()

    def _wait(self) -> None:
        pause_ms = None
        if self._next_start is not None:
            pause_ms = max(0.0, self._next_start - time.monotonic()) * 1000
        elif self._is_ready:
            pause_ms = self._watchdog.pause_s() * 1000
        if self._leaving:
            pause_ms = _LEAVE_PAUSE_S * 1000 if pause_ms is None else min(pause_ms, _LEAVE_PAUSE_S * 1000)
        for fd, _ in self._poller.poll(pause_ms):
            if self._signals is not None and fd == self._signals.fileno():
                self._leaving = self._leaving or TAKE_DOWN_SIGNAL in self._signals.come()
            if fd == self._tell:
                self._fail("nobody waits for the device any more")
                return
            for one in list(self._servers.values()):
                if fd == one.channel.fileno():
                    self._listen(one)
                elif fd == one.pidfd:
                    self._bury(one)
        self._end_hung()
        if not self._over and self._next_start is not None and time.monotonic() >= self._next_start:
            self._next_start = None
            if not self._has_ended():
                self._start(0)
        if self._leaving and not self._over:
            self._take_down_if_unused()

    def _has_ended(self) -> bool:
        return self._kind.has_ended(self._directory, self._connection)

    # Somebody let go of the device whose kernel side does not go by itself (see DeviceService.release).
    def _take_down_if_unused(self) -> None:
        if kinds.is_unused(self._directory):
            try:
                self._kind.take_down(self._directory)
            except DeviceError as error:
                log.info("%s: not taken down yet: %s", self._directory.name, error)

    @property
    def _is_ready(self) -> bool:
        return self._tell is None

    def _end_hung(self) -> None:
        if self._over or not self._is_ready or self._path is None:
            return
        servers = {number: one.pid for number, one in self._servers.items()}
        for number, why in self._watchdog.hung(self._path, servers).items():
            log.error("%s: server %d %s: killed, to be replaced", self._directory.name, number, why)
            self._kill(self._servers[number])
        if self._watchdog.hangs >= MAX_HANGS:
            self._give_up(f"{MAX_HANGS} servers that hung")

    def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        task = server.Task(self._connection, self._path, number, self._restarts, self._plan.kind)
        settings = self._helper_settings if number else self._plan.settings
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            self._could_not_start(number, f"cannot fork: {error.strerror}")
            return
        if pid == 0:
            become(lambda: self._serve(ours, theirs, task, settings))
        theirs.close()
        one = _Server(pid, os.pidfd_open(pid), ours, number)
        self._servers[number] = one
        self._poller.register(ours, select.POLLIN)
        self._poller.register(one.pidfd, select.POLLIN)

    def _could_not_start(self, number: int, why: str) -> None:
        log.error("%s: server %d: %s", self._directory.name, number, why)
        if number == 0 and self._is_ready:
            self._start_again(why)
        elif number == 0:
            self._say({"error": why})
            self._fail(why)

    # In the new process. What belongs to the keeper alone must not live on in it.
    def _serve(self, ours: socket.socket, theirs: socket.socket, task: server.Task, settings: str) -> None:
        ours.close()
        if self._signals is not None:
            self._signals.forget()
        signal.signal(TAKE_DOWN_SIGNAL, signal.SIG_IGN)
        for other in self._servers.values():
            other.channel.close()
            os.close(other.pidfd)
        if self._tell is not None:
            os.close(self._tell)
        server.serve(
            lambda: self._open(settings),
            self._directory,
            theirs,
            readahead_kib=self._plan.readahead_kib,
            task=task,
        )

    # A device whose content nobody may change must not get another image's.
    def _open(self, settings: str) -> Blob:
        config = Path(self._plan.config)
        record = DeviceRecord.load(self._directory) if self._path is not None else None
        if record is not None and record.read_only:
            present = hashlib.sha256(read_config(config)).hexdigest()
            if present != record.config_sha256:
                raise DeviceError(f"{config} has changed since the device was attached")
        return self._opener(config, settings)

    def _listen(self, one: _Server) -> bool:
        part = one.channel.recv(1 << 16)
        if not part:  # the process has ended, which its pidfd tells
            self._unwatch(one.channel.fileno())
            return False
        one.received += part
        while (end := one.received.find(b"\n")) >= 0:
            message = json.loads(one.received[:end])
            del one.received[: end + 1]
            self._hear(one, message)
        return True

    def _unwatch(self, fd: int) -> None:
        with suppress(KeyError):  # done before
            self._poller.unregister(fd)

    def _hear(self, one: _Server, message: dict[str, Any]) -> None:
        if "busy" in message:
            self._help()
        elif "ready" in message:
            one.ready_at = time.monotonic()
            if one.number == 0:
                self._is_served(message["ready"])
            else:
                self._save()
        elif "error" in message:
            one.error = message["error"]
            if self._is_ready:
                log.error("%s: server %d cannot serve: %s", self._directory.name, one.number, one.error)
            else:
                self._say(message)
        elif not self._is_ready:
            self._say(message)

    def _say(self, message: dict[str, Any]) -> None:
        assert self._tell is not None
        with suppress(BrokenPipeError):  # polling tells
            os.write(self._tell, json.dumps(message).encode() + b"\n")

    def _is_served(self, description: dict[str, Any]) -> None:
        self._path = Path(description["path"])
        can_go_on = description.pop("can_change_servers")
        self._description = description
        if self._former is not None:
            self._former.end()
            self._kind.send_again(self._connection)
            self._former = None
        if not can_go_on:
            log.warning("%s: the kernel is too old to let another server go on with it", self._directory.name)
        self._save(kept=can_go_on)
        if not self._is_ready:
            self._say({"ready": True})
            self._stop_telling()
        self._over = not can_go_on  # holding the connection would only keep its readers waiting after a death

    def _stop_telling(self) -> None:
        if self._tell is not None:
            self._poller.unregister(self._tell)
            os.close(self._tell)
            self._tell = None

    def _save(self, *, kept: bool = True) -> None:
        me = Process.of(os.getpid()) if kept else None
        known = DeviceRecord.load(self._directory)
        plan = {key: getattr(known or self._plan, key) for key in asdict(self._plan)}  # a snapshot changes the config
        record = DeviceRecord(
            **plan | {"code": self._plan.code} | self._description,
            keeper_pid=me.pid if me else 0,
            keeper_start_time=me.start_time if me else 0,
            helpers=[one.pid for one in self._servers.values() if one.number],
            restarts=self._restarts,
        )
        try:
            record.save(self._directory)
        except OSError as error:  # removed from under the device
            log.warning("%s: cannot write the device's record: %s", self._directory.name, error)

    def _help(self) -> None:
        free = set(range(1, self._most_servers)) - set(self._servers)
        if free and self._is_ready and self._description["read_only"]:
            self._start(min(free))

    def _bury(self, one: _Server) -> None:
        os.set_blocking(one.channel.fileno(), False)
        with suppress(BlockingIOError, OSError):
            while self._listen(one):
                pass
        _, status = os.waitpid(one.pid, 0)
        self._unwatch(one.channel.fileno())
        self._unwatch(one.pidfd)
        one.channel.close()
        os.close(one.pidfd)
        del self._servers[one.number]
        if self._over:
            return
        if not self._is_ready:
            self._fail(f"the server ended {_how(status)}")
            return
        if self._has_ended():
            if one.number == 0:
                self._kill_servers()  # helpers have nothing to bring to the disk
            return
        name, why = self._directory.name, one.error or f"ended {_how(status)}"
        log.log(
            logging.INFO if one.number and status == 0 else logging.ERROR, "%s: server %d %s", name, one.number, why
        )
        self._kind.send_again(self._connection)
        if one.number:
            self._save()
            return
        if one.ready_at is not None and time.monotonic() - one.ready_at >= HEALTHY_S:
            self._failures = self._deaths = 0
        if not one.error:
            self._deaths += 1
        self._restarts += 1
        self._start_again(why)

    def _start_again(self, why: str) -> None:
        now = time.monotonic()
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        if self._deaths >= MAX_DEATHS or now - self._failing_since > self._give_up_after_s:
            self._give_up(f"{self._failures} servers in {now - self._failing_since:.1f} s (the last: {why})")
            return
        pause = 0.0 if self._failures == 1 else min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures, 8))
        self._next_start = now + pause

    def _give_up(self, after: str) -> None:
        log.error("%s: given up after %s; its users get I/O errors", self._directory.name, after)
        self._kill_servers()
        self._over = True
        try:
            self._kind.give_up(self._directory)
        except DeviceError as error:
            log.error("%s: its users wait: %s", self._directory.name, error)

    # Nothing came of the first server, or of taking over.
    def _fail(self, why: str) -> None:
        log.error("%s: %s", self._directory.name, why)
        self._kill_servers()
        if self._former is not None:
            self._former.go_on()
        self._stop_telling()
        self._over = True

    def _kill_servers(self) -> None:
        for one in self._servers.values():
            self._kill(one)

    def _kill(self, one: _Server) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(one.pidfd, signal.SIGKILL)


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"by signal {os.WTERMSIG(status)}"
    return f"with status {os.waitstatus_to_exitcode(status)}"


def _settle_in(device_id: str) -> None:
    os.setsid()
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with its device
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    abi.set_process_name(f"keep:{device_id}")
    server.protect(device_id, _OOM_SCORE_ADJUST)
