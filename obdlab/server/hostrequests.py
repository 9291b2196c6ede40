"""The requests to a device host, each in a process of its own: attach, upgrade, keep, prime.

The process forks the device's keeper (``obdlab.server.keeper``), follows it until the device is ready, answers and
ends. It holds the lock of the device's directory meanwhile.
"""

from __future__ import annotations

import logging
import os
import select
import time
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from obdlab.devices import kinds
from obdlab.devices.kind import NO_CONNECTION
from obdlab.errors import DeviceError, ObdlabError
from obdlab.server import wire
from obdlab.server.forking import fork_to
from obdlab.server.keeper import Keeper
from obdlab.server.messages import (
    OF_HOST_CLIENT,
    OF_KEEPER,
    Attach,
    Attached,
    Failed,
    Keep,
    Kept,
    Message,
    Prime,
    Primed,
    Ready,
    Stage,
    Stale,
    Upgrade,
    Upgraded,
)
from obdlab.server.rundir import DeviceRecord, Plan, RunDir, clear_leftovers, held, remove_device
from obdlab.server.takeover import Former, Orphan, There, connection_of
from obdlab.settings.settings import Settings
from obdlab.system.processes import Process

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from obdlab.devices.kind import Kind
    from obdlab.server.installed import InstalledCode
    from obdlab.server.keeper import Opener

log = logging.getLogger(__name__)

#: A client sends its request at once; a slower client is dropped.
REQUEST_TIMEOUT_S = 10.0
_FAILED_KEEPER_S = 5.0
_REVIVAL_S = 10.0


class HostRequests:
    """Answers for the host of one run directory. ``opener`` turns a config path and settings into a blob."""

    def __init__(self, run: RunDir, opener: Opener, installed: InstalledCode) -> None:
        self._run = run
        self._opener = opener
        self._installed = installed
        self._code = installed.digest

    def handle(self, connection: socket.socket) -> None:
        """Receive one request, do it, answer."""
        answer: Message
        try:
            request = wire.receive(connection, REQUEST_TIMEOUT_S, OF_HOST_CLIENT)
            stale = isinstance(request, Attach | Upgrade) and self._installed.changed()
            self._installed.close()  # no server needs it
            # After a stale answer the client starts a new host, which runs the installed code.
            answer = Stale(True) if stale else self._answer(request, connection)
        except ObdlabError as error:
            answer = Failed.of(error)
        except Exception as error:
            log.exception("request failed")
            answer = Failed.of(error)
        try:
            wire.send(connection, answer)
        except OSError as error:  # the client is gone
            log.warning("client gone before its answer (%s): %s", error.strerror, answer)

    def _answer(self, request: Message, connection: socket.socket) -> Message:
        match request:
            case Attach():
                return Attached(self._attach(request, connection))
            case Upgrade():
                return Upgraded(self._upgrade(request))
            case Keep():
                return Kept(self._keep(request, connection))
            case Prime():
                return _prime(request)
        raise DeviceError(f"unknown request (got {request!r})")

    def _attach(self, request: Attach, connection: socket.socket) -> DeviceRecord:
        device_id, deadline = request.device_id, time.monotonic() + request.timeout_s
        directory = self._run.device(device_id)
        kind = _kind_of(request.settings)
        with held(directory, request.timeout_s) as lock:
            if _still_attached(directory, request) is None:
                clear_leftovers(directory)
                plan = Plan(
                    device_id,
                    str(Path(request.config)),
                    request.config_sha256,
                    request.settings,
                    request.readahead_kib,
                    self._code,
                    kind=kind.name,
                )
                with closed_at_end(kind.connect()) as handed_on:
                    try:
                        self._start_keeper(plan, directory, deadline, handed_on, (connection.fileno(), lock))
                    except BaseException:
                        remove_device(directory, force=True)
                        raise
                if _has_hung_up(connection):  # no client knows of the device: it was killed or gave up
                    remove_device(directory, force=True)
                    raise DeviceError(f"device {device_id}: its client went away during the attach")
            record = DeviceRecord.load(directory)
            if record is None:
                raise DeviceError(f"device {device_id}: gone again")
            return record

    def _upgrade(self, request: Upgrade) -> bool:
        deadline, directory = time.monotonic() + request.timeout_s, self._run.device(request.device_id)
        device_id = directory.name
        with self._held_if_there(directory, deadline) as (lock, record):
            if not record.alive:
                raise DeviceError(f"device {device_id}: no such device is being served")
            if record.is_graduated or (record.code == self._code and record.is_kept and not request.force):
                return False
            kind = kinds.find(record.kind)
            if record.keeper is None and not kind.can_change_servers():
                raise DeviceError(
                    f"device {device_id}: the kernel lets no other server go on with it (Linux 6.9 does)"
                )
            former = Former(record)
            with closed_at_end(former.connection() if kind.is_shared else NO_CONNECTION) as handed_on:
                try:
                    self._start_keeper(self._plan_of(record), directory, deadline, handed_on, (lock,), former)
                except BaseException:
                    former.go_on()  # the new keeper does that unless it was killed
                    raise
        return True

    def revive(self, directory: Path) -> None:
        """Give a device without keeper and server both again. Raises DeviceError."""
        with self._held_if_there(directory, time.monotonic() + _REVIVAL_S) as (lock, record):
            if is_revivable(directory, record):
                self._start_keeper(
                    self._plan_of(record),
                    directory,
                    time.monotonic() + _REVIVAL_S,
                    NO_CONNECTION,
                    (lock,),
                    record,
                )

    # Yields the lock and the record of a known device. Raises DeviceError if the device is unknown.
    @contextmanager
    def _held_if_there(self, directory: Path, deadline: float) -> Iterator[tuple[int, DeviceRecord]]:
        with held(directory, deadline - time.monotonic()) as lock:
            record = DeviceRecord.load(directory)
            if record is None:
                with suppress(OSError):
                    directory.rmdir()  # was made only for the lock
                raise DeviceError(f"device {directory.name}: no such device is being served")
            yield lock, record

    def _plan_of(self, record: DeviceRecord) -> Plan:
        return Plan(**{each.name: getattr(record, each.name) for each in fields(Plan)} | {"code": self._code})

    # A server whose keeper was killed asks for another keeper, which adopts it; the connection becomes their channel.
    def _keep(self, request: Keep, connection: socket.socket) -> bool:
        deadline, directory = time.monotonic() + request.timeout_s, self._run.device(request.device_id)
        peer = wire.peer_of(connection)
        process = Process.of(peer.pid)
        if process is None:
            raise DeviceError(f"device {directory.name}: server {peer.pid} is gone")
        description = structs.replace(request.server, pid=process.pid, start_time=process.start_time)
        with self._held_if_there(directory, deadline) as (lock, record):
            if record.is_kept or (record.process.alive and record.pid != peer.pid):
                raise DeviceError(f"device {directory.name}: is served by others (server {record.pid})")
            orphan = Orphan(connection, description, record.code)
            is_shared = kinds.find(record.kind).is_shared
            with closed_at_end(connection_of(peer.pid) if is_shared else NO_CONNECTION) as handed_on:
                self._start_keeper(self._plan_of(record), directory, deadline, handed_on, (lock,), orphan)
        return True

    # Forks the keeper and follows it until the device is ready. A keeper whose pipe is closed ends, with its
    # processes.
    def _start_keeper(
        self,
        plan: Plan,
        directory: Path,
        deadline: float,
        handed_on: int,
        not_its: tuple[int, ...],
        there: There = None,
    ) -> None:
        reader, writer = os.pipe()

        def keep() -> None:
            for fd in (reader, *not_its):
                os.close(fd)
            Keeper(plan, directory, self._opener, handed_on, writer, there).run()

        pid = None
        try:
            try:
                pid = fork_to(keep)
            finally:
                os.close(writer)
            _follow(reader, deadline)
        except BaseException:
            os.close(reader)  # the keeper ends then
            keeper = None if pid is None else Process.of(pid)
            if keeper is not None:
                keeper.end(_FAILED_KEEPER_S)
            raise
        os.close(reader)


def stays_without_server(record: DeviceRecord) -> bool:
    """Return True if the kernel keeps such a device after the death of all its processes; its users wait then.

    A FUSE connection ends with the last process that holds it; TCMU and ublk devices stay.
    """
    try:
        return not kinds.find(record.kind).is_shared
    except DeviceError:  # a kind of another version
        return False


def is_revivable(directory: Path, record: DeviceRecord) -> bool:
    """Return True if a device is still in the kernel and waits for a server that no process will start."""
    if record.alive or not stays_without_server(record):
        return False
    return Path(record.path) in kinds.find(record.kind).devices_of(directory)


def _prime(request: Prime) -> Primed:
    from obdlab.image.config import ImageConfig
    from obdlab.image.priming import prime, prime_start

    run = prime_start if request.start else prime
    run(ImageConfig.from_json(request.image), Settings.from_json(request.settings))
    return Primed()


@contextmanager
def closed_at_end(fd: int) -> Iterator[int]:
    """Close a descriptor, unless it is negative, at the end of a ``with``."""
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _has_hung_up(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    return bool(poller.poll(0))


# Raises DeviceError if this host has no devices of the kind in the settings.
def _kind_of(settings: str) -> Kind:
    kind = kinds.find(Settings.from_json(settings).device_kind)
    kinds.check(kind)
    return kind


def _still_attached(directory: Path, request: Attach) -> DeviceRecord | None:
    record = DeviceRecord.load(directory)
    if record is None or not record.alive:
        return None
    if Path(record.path) not in kinds.devices_of(directory):
        return None  # the device was taken away: worth no more than a dead server
    if record.config != str(Path(request.config)):
        raise DeviceError(
            f"device {record.device_id}: already attached for {record.config} (wanted {request.config})"
        )
    if record.config_sha256 != request.config_sha256:
        raise DeviceError(
            f"device {record.device_id}: {request.config} has changed since it was attached; detach it first"
        )
    wanted = Settings.from_json(request.settings).device_kind
    if wanted not in (kinds.AUTOMATIC, record.kind):
        raise DeviceError(f"device {record.device_id}: attached as {record.kind} (wanted {wanted}); detach it first")
    return record


def _follow(reader: int, deadline: float) -> None:
    stage, lines = "starting", wire.Lines()
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poller.poll(remaining * 1000):
            raise DeviceError(f"gave up at the deadline of the attach, while {stage}")
        part = os.read(reader, 1 << 16)
        if not part:
            raise DeviceError(f"the device server ended unexpectedly while {stage} (its log says more)")
        lines.add(part)
        while (line := lines.take()) is not None:
            match wire.decode(line, OF_KEEPER):
                case Failed() as failed:
                    raise failed.restore()
                case Ready():
                    return
                case Stage(now):
                    stage = now
