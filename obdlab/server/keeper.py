"""The keeper of a device: holds its /dev/fuse connection, so that the device outlives its server.

One process per device that only waits: forked from the warmed host, it shares the host's memory. When a server dies,
for any reason, the keeper has the kernel hand out all unanswered requests again (Linux 6.9) and forks the next
server, which opens the image again; users of the device see a pause. The keeper kills a server that hangs
(``obdlab.server.watchdog``). It also forks helpers for a server that is short of processor time. A device is given
up if its servers die again and again at once, or hang, or cannot open the image for the read deadline: the connection
is closed, and the device's users get I/O errors instead of waiting for ever.

A killed keeper is replaced as well: its server holds the connection too, and has the device host fork another keeper,
which adopts the server (``obdlab.server.keeperlink``).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from obdlab.devices import kinds
from obdlab.errors import DeviceError
from obdlab.image.config import digest_of_config
from obdlab.server import server, wire
from obdlab.server.deaths import Deaths, Start
from obdlab.server.forking import Signals, become
from obdlab.server.keeperstate import KEPT, TRANSITIONS, State
from obdlab.server.messages import Busy, Description, Failed, Message, Ready, Stage
from obdlab.server.protection import KEEPER_MEMORY, KEEPER_OOM_SCORE_ADJUST, bound_memory, protect
from obdlab.server.rundir import TAKE_DOWN_SIGNAL, DeviceRecord, Plan, record_locked
from obdlab.server.serverprocess import ServerProcess, Task, how_ended, killed_by
from obdlab.server.takeover import Former, Orphan, There, record_of
from obdlab.server.watchdog import Watchdog
from obdlab.settings.settings import Settings
from obdlab.states import StateOf
from obdlab.system import abi
from obdlab.system.processes import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob

    Opener = Callable[[Path, str], Blob]

log = logging.getLogger(__name__)

_LEAVE_PAUSE_S = 1.0
#: After this many servers in a row that hung and answered nothing at all, the device is given up.
MAX_HANGS = 3


class Keeper:
    """Keeps the device at ``directory`` going, from the fork of its first server to its end.

    The servers' messages go to the pipe ``tell`` until the device is ready or has failed. ``there`` is the part of
    the device that exists already: nothing; its former processes, which are replaced; its server, which stays; or
    its record alone, as keeper and server are dead.
    """

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        opener: Opener,
        connection: int,
        tell: int,
        there: There = None,
    ) -> None:
        self._plan = plan
        self._directory = directory
        self._opener = opener
        self._connection = connection
        self._kind = kinds.find(plan.kind)
        self._there = there
        self._former = there if isinstance(there, Former) else None
        self._state = StateOf("keeper", State.STARTING if self._former is None else State.REPLACING, TRANSITIONS)
        self._take_down_wanted = False
        self._tell: int | None = tell
        settings = Settings.from_json(plan.settings)
        self._most_servers = settings.server_processes or min(4, os.cpu_count() or 1)
        self._helper_settings = replace(settings, download_enabled=False, completion=False).to_json()
        before = record_of(there) or DeviceRecord.load(directory)
        self._path = Path(before.path) if before and isinstance(there, Former | DeviceRecord) else None
        self._restarts = 0 if before is None else before.restarts + isinstance(there, DeviceRecord)
        self._servers: dict[int, ServerProcess] = {}
        self._poller = select.poll()
        self._next_start: float | None = None
        self._deaths = Deaths(settings.read_deadline_s)
        self._description: Description | None = None
        #: Digest of the code that the server runs.
        self._code = there.code if isinstance(there, Orphan) else plan.code
        self._watchdog = Watchdog(directory, settings)
        self._signals: Signals | None = None

    def run(self) -> None:
        """Return when the device is gone, was given up, or needs no keeper."""
        _settle_in(self._directory.name)
        self._signals = Signals(TAKE_DOWN_SIGNAL)
        self._poller.register(self._signals, select.POLLIN)
        if self._tell is not None:
            self._poller.register(self._tell, 0)  # an event comes when the reader is closed
        match self._there:
            case Orphan() as orphan:
                self._adopt(orphan)
            case DeviceRecord() as record:
                self._revive(record)
            case Former() as former:
                former.make_way()
                self._start(0)
            case None:
                self._start(0)
        while self._state.now is not State.OVER and (self._servers or self._next_start is not None):
            self._wait()

    def _wait(self) -> None:
        for fd, _ in self._poller.poll(self._pause_ms()):
            if self._signals is not None and fd == self._signals.fileno():
                self._take_down_wanted = self._take_down_wanted or TAKE_DOWN_SIGNAL in self._signals.come()
            if fd == self._tell:
                self._fail("the client of the attach has gone")
                return
            for one in list(self._servers.values()):
                if fd == one.channel.fileno():
                    self._listen(one)
                elif fd == one.pidfd:
                    self._bury(one)
        if self._state.now in KEPT:
            self._end_hung()
        if self._state.now in KEPT and self._next_start is not None and time.monotonic() >= self._next_start:
            self._next_start = None
            if not self._has_ended():
                self._start(0)
        if self._take_down_wanted and self._state.now is not State.OVER:
            self._take_down_if_unused()

    def _pause_ms(self) -> float | None:
        pauses = []
        if self._next_start is not None:
            pauses.append(max(0.0, self._next_start - time.monotonic()))
        elif self._state.now in KEPT:
            pauses.append(self._watchdog.pause_s())
        if self._take_down_wanted:
            pauses.append(_LEAVE_PAUSE_S)
        return min(pauses) * 1000 if pauses else None

    def _has_ended(self) -> bool:
        return self._kind.has_ended(self._directory, self._connection)

    # A client let go of a device whose kernel side does not go by itself (see DeviceService.release).
    def _take_down_if_unused(self) -> None:
        if kinds.is_unused(self._directory):
            try:
                self._kind.take_down(self._directory)
            except DeviceError as error:
                log.info("%s: not taken down yet: %s", self._directory.name, error)

    def _end_hung(self) -> None:
        if self._path is None:
            return
        servers = {number: one.pid for number, one in self._servers.items()}
        for number, why in self._watchdog.hung(self._path, servers).items():
            log.error("%s: server %d %s: killed, to be replaced", self._directory.name, number, why)
            self._servers[number].kill()
        if self._watchdog.hangs >= MAX_HANGS:
            self._give_up(f"{MAX_HANGS} servers that hung")

    # Another process may have been killed before this one had its pidfd.
    def _adopt(self, orphan: Orphan) -> None:
        orphan.channel.settimeout(None)
        try:
            one = ServerProcess(orphan.description.pid, orphan.channel, 0)
        except OSError as error:
            self._say(Failed(f"server {orphan.description.pid}: {error.strerror}"))
            self._fail(f"its server {orphan.description.pid} is gone: {error.strerror}")
            return
        self._watch(one)
        one.start = Start.now(Path(orphan.description.path))
        self._is_served(orphan.description)
        if orphan.description.read_only:  # helpers not yet recorded died with their keeper
            self._kind.send_again(self._connection)

    # The host's child waits for the record alone: the image may take long to open, and the device exists.
    def _revive(self, record: DeviceRecord) -> None:
        log.error("%s: keeper and server are gone: starting a server", self._directory.name)
        self._state.become(State.RESTARTING)
        self._description = Description(
            record.kind, record.path, record.size, record.read_only, True, record.pid, record.start_time
        )
        self._save()
        self._say(Ready(None))
        self._stop_telling()
        self._start(0)

    def _start(self, number: int) -> None:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._could_not_start(number, f"no socket pair: {error.strerror}")
            return
        task = Task(self._connection, self._path, number, self._restarts, self._plan.kind, self._plan.settings)
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
        self._watch(ServerProcess(pid, ours, number))
        if number == 0 and self._state.now is State.RESTARTING:
            self._save()

    def _watch(self, one: ServerProcess) -> None:
        self._servers[one.number] = one
        self._poller.register(one.channel, select.POLLIN)
        self._poller.register(one.pidfd, select.POLLIN)

    def _could_not_start(self, number: int, why: str) -> None:
        log.error("%s: server %d: %s", self._directory.name, number, why)
        if number == 0 and self._state.now in KEPT:
            self._start_again(why, reported=True)
        elif number == 0:
            self._say(Failed(why))
            self._fail(why)

    # Runs in the new process. Descriptors that belong to the keeper alone must not live on in it.
    def _serve(self, ours: socket.socket, theirs: socket.socket, task: Task, settings: str) -> None:
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

    # A read-only device must not get another image's content.
    def _open(self, settings: str) -> Blob:
        config = Path(self._plan.config)
        record = DeviceRecord.load(self._directory) if self._path is not None else None
        if record is not None and record.read_only:
            present = digest_of_config(config)
            if present != record.config_sha256:
                raise DeviceError(f"{config} has changed since the device was attached")
        return self._opener(config, settings)

    def _listen(self, one: ServerProcess) -> None:
        messages = one.listen()
        if messages is None:  # the process has ended, and its pidfd has an event too
            self._unwatch(one.channel.fileno())
        for message in messages or ():
            self._hear(one, message)

    def _unwatch(self, fd: int) -> None:
        with suppress(KeyError):  # done before
            self._poller.unregister(fd)

    def _hear(self, one: ServerProcess, message: Message) -> None:
        match message:
            case Busy():
                self._help()
            case Ready(description):
                if one.number:
                    self._save()
                elif description is not None:
                    self._code = self._plan.code
                    self._is_served(description)
                one.start = Start.now(self._path) if self._path is not None else None
            case Failed() as failed:
                one.failed = failed
                if self._state.now in KEPT:
                    log.error("%s: server %d cannot serve: %s", self._directory.name, one.number, failed.error)
                else:
                    self._say(failed)
            case Stage() if self._state.now not in KEPT:
                self._say(message)

    def _say(self, message: Message) -> None:
        if self._tell is not None:
            with suppress(BrokenPipeError):  # the poller reports it
                os.write(self._tell, wire.encode(message))

    def _is_served(self, description: Description) -> None:
        self._path = Path(description.path)
        can_go_on = description.can_change_servers
        self._description = description
        if self._former is not None:
            self._former.end()
            self._kind.send_again(self._connection)
            self._former = None
        if not can_go_on:
            log.warning("%s: the kernel is too old to let another server go on with it", self._directory.name)
        self._state.become(State.SERVED)
        self._save(kept=can_go_on)
        self._say(Ready(None))
        self._stop_telling()
        if not can_go_on:  # an open connection would only keep its readers waiting after a death
            self._state.become(State.OVER)

    def _stop_telling(self) -> None:
        if self._tell is not None:
            self._poller.unregister(self._tell)
            os.close(self._tell)
            self._tell = None

    def _save(self, *, kept: bool = True) -> None:
        try:
            with record_locked(self._directory):
                self._record(kept=kept).save(self._directory)
        except OSError as error:  # removed from under the device
            log.warning("%s: cannot write the device's record: %s", self._directory.name, error)

    def _record(self, *, kept: bool) -> DeviceRecord:
        me = Process.of(os.getpid()) if kept else None
        known = DeviceRecord.load(self._directory)
        starting = (
            Process.of(self._servers[0].pid) if self._state.now is State.RESTARTING and 0 in self._servers else None
        )
        described = self._description
        assert described is not None, "no server was ready yet"
        plan = known or self._plan  # a snapshot changes the config
        return DeviceRecord(
            device_id=plan.device_id,
            config=plan.config,
            config_sha256=plan.config_sha256,
            settings=plan.settings,
            readahead_kib=plan.readahead_kib,
            code=self._code,
            graduated=plan.graduated,
            kind=described.kind,
            path=described.path,
            size=described.size,
            read_only=described.read_only,
            pid=described.pid,
            start_time=described.start_time,
            keeper_pid=me.pid if me else 0,
            keeper_start_time=me.start_time if me else 0,
            helpers=[one.pid for one in self._servers.values() if one.number],
            restarts=self._restarts,
            starting_pid=starting.pid if starting else msgspec.UNSET,
            starting_start_time=starting.start_time if starting else msgspec.UNSET,
        )

    def _help(self) -> None:
        free = set(range(1, self._most_servers)) - set(self._servers)
        if free and self._state.now in KEPT and self._description is not None and self._description.read_only:
            self._start(min(free))

    def _bury(self, one: ServerProcess) -> None:
        for message in one.last_messages():
            self._hear(one, message)
        self._unwatch(one.channel.fileno())
        self._unwatch(one.pidfd)
        status = one.bury()
        del self._servers[one.number]
        if self._state.now not in KEPT:
            if self._state.now in (State.STARTING, State.REPLACING):
                self._fail(f"the server ended {how_ended(status)}")
            return
        if self._has_ended():
            if one.number == 0:
                self._state.become(State.ENDING)
                self._kill_servers()  # helpers have no data to flush
            return
        name, why = self._directory.name, one.failed.error if one.failed else f"ended {how_ended(status)}"
        log.log(
            logging.INFO if one.number and status == 0 else logging.ERROR, "%s: server %d %s", name, one.number, why
        )
        self._kind.send_again(self._connection)
        if one.number:
            self._save()
            return
        if one.start is not None and self._path is not None and one.start.was_healthy(self._path, killed_by(status)):
            self._deaths.forget()
        self._restarts += 1
        self._start_again(why, reported=one.failed is not None)

    def _start_again(self, why: str, *, reported: bool) -> None:
        self._state.become(State.RESTARTING)
        enough = self._deaths.count(reported=reported)
        if enough:
            self._give_up(f"{enough} (the last: {why})")
        else:
            self._next_start = time.monotonic() + self._deaths.pause_s

    def _give_up(self, after: str) -> None:
        log.error("%s: given up after %s; its users get I/O errors", self._directory.name, after)
        self._kill_servers()
        self._state.become(State.OVER)
        try:
            self._kind.give_up(self._directory)
        except DeviceError as error:
            log.error("%s: its users wait: %s", self._directory.name, error)

    # The first server, or the take-over, failed.
    def _fail(self, why: str) -> None:
        log.error("%s: %s", self._directory.name, why)
        self._kill_servers()
        if self._former is not None:
            self._former.go_on()
        self._stop_telling()
        self._state.become(State.OVER)

    def _kill_servers(self) -> None:
        for one in self._servers.values():
            one.kill()


def _settle_in(device_id: str) -> None:
    os.setsid()
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the keeper ends with its device
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    abi.set_process_name(f"keep:{device_id}")
    protect(device_id, KEEPER_OOM_SCORE_ADJUST)
    bound_memory(KEEPER_MEMORY)
