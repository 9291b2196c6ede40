"""The device host: a warmed process that forks what a device needs.

Python and its libraries take a third of a second to start and tens of megabytes; a fork of a process that has them
takes milliseconds and shares the memory. The host has a single thread and holds no state: it accepts a connection
and forks a child that does the rest, so a slow attach never holds up another one, and killing the host loses nothing.
That child forks the device's keeper (``obdlab.service.keeper``), and the keeper the server.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.devices import abi, kinds
from obdlab.errors import DeviceError, ObdlabError
from obdlab.image.settings import Settings
from obdlab.observe import audit, logs
from obdlab.ownfiles import open_own
from obdlab.service import wire
from obdlab.service.forking import Signals, fork_to
from obdlab.service.installed import InstalledCode
from obdlab.service.keeper import Keeper
from obdlab.service.rundir import SOCKET_NAME, DeviceRecord, Plan, Process, RunDir, held, remove_device
from obdlab.service.takeover import Former

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Blob
    from obdlab.service.keeper import Opener

log = logging.getLogger(__name__)

#: A client sends its request at once; one that does not is dropped.
_REQUEST_TIMEOUT_S = 10.0
#: How often an idle host looks whether it is still of use.
IDLE_CHECK_S = 30.0
#: Imported before the first fork, so that no server has to.
_TROUBLE_PAUSE_S = 0.2
_FAILED_KEEPER_S = 5.0
_WARM = ("obdlab.image.open", "obdlab.image.config", "obdlab.image.settings")
#: Imported when there is nothing to do: the first attach, which starts the host, shall not wait for it.
_WARM_LATER = ("obdlab.image.remote",)
_AT_ONCE_S = 0.001
_WARM_KINDS = {
    "fuse+loop": "obdlab.devices.fuse_loop",
    "ublk": "obdlab.devices.ublk.device",
    "tcmu": "obdlab.devices.tcmu.device",
}


def open_configured(config_path: Path, settings_json: str) -> Blob:
    """Open the image that a config.v1.json describes; the settings are as ``Settings.to_json`` wrote them."""
    from obdlab.image.config import ImageConfig
    from obdlab.image.open import open_image

    settings = Settings.from_json(settings_json)
    audit.configure(settings.audit_path, size=settings.audit_size, count=settings.audit_count, who=logs.process_name)
    return open_image(ImageConfig.load(config_path), settings)


class Host:
    """Listens in a run directory. ``opener`` turns a config path and settings into a blob."""

    def __init__(self, run_dir: Path, opener: Opener = open_configured) -> None:
        self._run = RunDir(run_dir)
        self._run.create()
        self._opener = opener
        self._installed = InstalledCode()
        self._code = self._installed.digest
        self._lock = -1
        self._socket_inode = 0
        self._listener: socket.socket | None = None
        self._signals: Signals | None = None
        self._to_warm: tuple[str, ...] = ()

    def bind(self, timeout_s: float = 10.0) -> bool:
        """Become the run directory's host and listen; False if another one answers there.

        Raises DeviceError if neither comes about within ``timeout_s``.
        """
        path = self._run.path / SOCKET_NAME
        deadline = time.monotonic() + timeout_s
        lock = open_own(self._run.path / "host.lock", os.O_RDWR | os.O_CREAT)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if _answers(path):
                    os.close(lock)
                    return False
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise DeviceError(f"{path}: another device host has the lock but does not answer") from None
                time.sleep(0.02)
        self._lock = lock
        me = Process.of(os.getpid())
        (self._run.path / "host.pid").write_text(json.dumps({"pid": os.getpid(), "start_time": me and me.start_time}))
        self._listener = wire.listen(path)
        self._socket_inode = os.stat(path).st_ino
        return True

    def run(self) -> None:
        """Serve requests until told to end by SIGTERM, or until nobody can reach the socket any more."""
        assert self._listener is not None, "bind first"
        self._signals = _settle_in()
        if self._opener is open_configured:
            _warm_up(_WARM)
            self._to_warm = _WARM_LATER
        self._listener.setblocking(False)
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._signals, select.POLLIN)
        while True:
            events = poller.poll((_AT_ONCE_S if self._to_warm else IDLE_CHECK_S) * 1000)
            signals = self._signals.come()
            if signal.SIGTERM in signals:
                return
            if signal.SIGCHLD in signals:
                _reap()
            if any(fd == self._listener.fileno() for fd, _ in events):
                self._accept(self._listener)
            elif self._to_warm:
                _warm_up(self._to_warm)
                self._to_warm = ()
            elif self._is_unreachable():
                return

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:  # the client has hung up
            return
        except OSError as error:  # no descriptors or no memory left, for now
            log.error("cannot accept a request: %s", error.strerror)
            time.sleep(_TROUBLE_PAUSE_S)
            return
        with connection:
            connection.setblocking(True)
            try:
                fork_to(partial(self._answer, connection))
            except OSError as error:  # no memory, or too many processes: perhaps the next request has more luck
                _refuse(connection, f"cannot fork: {error.strerror}")

    # The run directory was removed, or another host took its place.
    def _is_unreachable(self) -> bool:
        try:
            return os.stat(self._run.path / SOCKET_NAME).st_ino != self._socket_inode
        except OSError:
            return True

    # In a child. The lock and the listener belong to the host alone: what kept them would outlive it with them.
    def _answer(self, connection: socket.socket) -> None:
        assert self._listener is not None
        assert self._signals is not None
        self._signals.forget()
        self._listener.close()
        os.close(self._lock)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self._handle(connection)

    def _handle(self, connection: socket.socket) -> None:
        answer: dict[str, Any]
        try:
            request = wire.receive(connection, _REQUEST_TIMEOUT_S)
            stale = request.get("op") in ("attach", "upgrade") and self._installed.changed()
            self._installed.close()  # no server needs it
            if stale:
                answer = {"stale": True}  # the client starts a new host, which runs what is installed now
            elif request.get("op") == "attach":
                answer = {"device": self._attach(request, connection)}
            elif request.get("op") == "prime":
                answer = _prime(request)
            elif request.get("op") == "upgrade":
                answer = {"upgraded": self._upgrade(request)}
            else:
                answer = {"error": f"unknown request (got {request.get('op')!r})"}
        except ObdlabError as error:
            answer = {"error": str(error)}
        except Exception as error:
            log.exception("request failed")
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            wire.send(connection, answer)
        except OSError as error:  # the client is gone
            log.warning("client gone before its answer (%s): %s", error.strerror, answer)

    def _attach(self, request: dict[str, Any], connection: socket.socket) -> dict[str, Any]:
        try:
            config, device_id = Path(request["config"]), str(request["device_id"])
            settings, timeout_s = str(request["settings"]), float(request["timeout_s"])
            sha256, readahead_kib = str(request["config_sha256"]), int(request["readahead_kib"])
        except (KeyError, TypeError, ValueError) as error:
            raise DeviceError(f"attach request: {error!r}") from error
        deadline = time.monotonic() + timeout_s
        directory = self._run.device(device_id)
        kind = _kind_of(settings)
        with held(directory, timeout_s) as lock:
            if _still_attached(directory, config, sha256, settings) is None:
                _clear_leftovers(directory, device_id)
                plan = Plan(device_id, str(config), sha256, settings, readahead_kib, self._code, kind=kind.name)
                with closed_at_end(kind.connect()) as handed_on:
                    try:
                        self._start_keeper(plan, directory, deadline, handed_on, (connection.fileno(), lock))
                    except BaseException:
                        remove_device(directory, force=True)
                        raise
                if _has_hung_up(connection):  # nobody would know of the device: its client was killed or gave up
                    remove_device(directory, force=True)
                    raise DeviceError(f"device {device_id}: its client went away during the attach")
            record = DeviceRecord.load(directory)
            if record is None:
                raise DeviceError(f"device {device_id}: gone again")
            return asdict(record)

    def _upgrade(self, request: dict[str, Any]) -> bool:
        try:
            device_id, timeout_s = str(request["device_id"]), float(request["timeout_s"])
            force = bool(request["force"])
        except (KeyError, TypeError, ValueError) as error:
            raise DeviceError(f"upgrade request: {error!r}") from error
        deadline = time.monotonic() + timeout_s
        directory = self._run.device(device_id)
        with held(directory, timeout_s) as lock:
            record = DeviceRecord.load(directory)
            if record is None or not record.alive:
                if record is None:
                    shutil.rmtree(directory)  # made to be locked
                raise DeviceError(f"device {device_id}: no such device is being served")
            if record.is_graduated or (record.code == self._code and record.is_kept and not force):
                return False
            kind = kinds.find(record.kind)
            if record.keeper is None and not kind.can_change_servers():
                raise DeviceError(
                    f"device {device_id}: the kernel lets no other server go on with it (Linux 6.9 does)"
                )
            former = Former(record)
            plan = Plan(**{each.name: getattr(record, each.name) for each in fields(Plan)} | {"code": self._code})
            with closed_at_end(former.connection() if kind.is_shared else kinds.NO_CONNECTION) as handed_on:
                self._start_keeper(plan, directory, deadline, handed_on, (lock,), former)
        return True

    # Forks the keeper and follows it until the device is ready. A keeper that nobody follows any more ends, with all
    # that is its.
    def _start_keeper(
        self,
        plan: Plan,
        directory: Path,
        deadline: float,
        handed_on: int,
        not_its: tuple[int, ...],
        former: Former | None = None,
    ) -> None:
        reader, writer = os.pipe()

        def keep() -> None:
            for fd in (reader, *not_its):
                os.close(fd)
            Keeper(plan, directory, self._opener, handed_on, writer, former).run()

        pid = None
        try:
            try:
                pid = fork_to(keep)
            finally:
                os.close(writer)
            _follow(reader, deadline)
        except BaseException:
            os.close(reader)  # tells the keeper
            keeper = None if pid is None else Process.of(pid)
            if keeper is not None:
                keeper.end(_FAILED_KEEPER_S)
            raise
        os.close(reader)


def _prime(request: dict[str, Any]) -> dict[str, Any]:
    from obdlab.image.config import ImageConfig
    from obdlab.image.priming import prime

    prime(ImageConfig.from_json(request.get("image")), Settings.from_json(str(request.get("settings"))))
    return {}


@contextmanager
def closed_at_end(fd: int) -> Iterator[int]:
    """Close a descriptor, if it is one, at the end of a ``with``."""
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _refuse(connection: socket.socket, reason: str) -> None:
    log.error("request refused: %s", reason)
    try:
        wire.receive(connection, _TROUBLE_PAUSE_S)  # closed with it unread, the answer could be lost
    except DeviceError:
        pass
    try:
        wire.send(connection, {"error": reason})
    except OSError as error:
        log.warning("client gone before its answer: %s", error.strerror)


def _has_hung_up(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    return bool(poller.poll(0))


# Raises DeviceError if this host has none of the kind that is asked for.
def _kind_of(settings: str) -> kinds.Kind:
    kind = kinds.find(Settings.from_json(settings).device_kind)
    kinds.check(kind)
    return kind


def _still_attached(directory: Path, config: Path, sha256: str, settings: str) -> DeviceRecord | None:
    record = DeviceRecord.load(directory)
    if record is None or not record.alive:
        return None
    if Path(record.path) not in kinds.devices_of(directory):
        return None  # somebody took the device away: worth no more than a dead server
    if record.config != str(config):
        raise DeviceError(f"device {record.device_id}: already attached for {record.config} (wanted {config})")
    if record.config_sha256 != sha256:
        raise DeviceError(f"device {record.device_id}: {config} has changed since it was attached; detach it first")
    wanted = Settings.from_json(settings).device_kind
    if wanted not in (kinds.AUTOMATIC, record.kind):
        raise DeviceError(f"device {record.device_id}: attached as {record.kind} (wanted {wanted}); detach it first")
    return record


def _clear_leftovers(directory: Path, device_id: str) -> None:
    record = DeviceRecord.load(directory)
    try:
        kinds.take_down(directory)
    except DeviceError as error:
        raise DeviceError(f"device {device_id}: its server is dead, but {error}") from error
    if record is not None:
        for process in record.servers():
            process.end(2.0)
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _follow(reader: int, deadline: float) -> None:
    stage, buffered = "starting", b""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poller.poll(remaining * 1000):
            raise DeviceError(f"gave up at the deadline of the attach, while {stage}")
        part = os.read(reader, 1 << 16)
        if not part:
            raise DeviceError(f"the device server ended unexpectedly while {stage} (its log says more)")
        buffered += part
        *lines, buffered = buffered.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                raise DeviceError(message["error"])
            if "ready" in message:
                return
            stage = message["stage"]


def _settle_in() -> Signals:
    signals = Signals(signal.SIGCHLD, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    abi.set_process_name("obdlab-host")
    try:
        abi.prctl(abi.PR_SET_CHILD_SUBREAPER, 1)
    except OSError as error:
        log.info("no subreaper: %s", error)
    return signals


# Tells one installed state of the package from another, as make does it: by size and time of its files.
def _warm_up(names: tuple[str, ...]) -> None:
    present = [module for name, module in _WARM_KINDS.items() if not kinds.KINDS[name].missing()]
    for name in (*names, *present):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector must not touch, and so unshare, what all servers share


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if os.WIFSIGNALED(status):
            log.error("process %d died by signal %d", pid, os.WTERMSIG(status))


def _answers(path: Path) -> bool:
    try:
        wire.connect(path, 2.0).close()
    except OSError:
        return False
    return True
