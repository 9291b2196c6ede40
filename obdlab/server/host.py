"""The device host: a warmed process that forks keepers and servers.

Python and its libraries take a third of a second to start and tens of megabytes; a fork of a process that has them
takes milliseconds and shares the memory. The host has a single thread and holds no state. It accepts a connection and
forks a child that does the rest, so a slow attach never delays another one, and killing the host loses nothing. The
child forks the device's keeper (``obdlab.server.keeper``), and the keeper the server. The host also looks for
devices that wait in the kernel while keeper and server are both dead, and has them served again.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import kinds
from obdlab.errors import DeviceError
from obdlab.layers import native
from obdlab.observe import audit, logs
from obdlab.server import wire
from obdlab.server.forking import Signals, fork_to
from obdlab.server.hostrequests import HostRequests, is_revivable, stays_without_server
from obdlab.server.installed import InstalledCode
from obdlab.server.messages import OF_HOST_CLIENT, Failed
from obdlab.server.protection import bound_memory, unprotect
from obdlab.server.rundir import HOST_PID_NAME, SOCKET_NAME, DeviceRecord, RunDir
from obdlab.settings.settings import Settings
from obdlab.system import abi
from obdlab.system.locks import lock_until
from obdlab.system.ownfiles import open_own
from obdlab.system.processes import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from obdlab.blob import Blob
    from obdlab.devices.kind import Kind
    from obdlab.server.keeper import Opener

log = logging.getLogger(__name__)

#: How often an idle host checks whether it is still needed.
IDLE_CHECK_S = 30.0
#: The same while devices exist that could wait for a server for ever: their users are to wait seconds at most.
WAITING_CHECK_S = 2.0
#: Requests under way at a time, one process each. Further clients wait in the listener's queue.
MAX_REQUESTS = 128
_TROUBLE_PAUSE_S = 0.2
_LOOK_FOR_HOST_S = 0.02
#: Imported before the first fork, so that no server has to.
_WARM = ("obdlab.image.open", "obdlab.image.config", "obdlab.settings.settings")
#: Imported when the host is idle: the first attach, which starts the host, must not wait for it.
_WARM_LATER = ("obdlab.image.remote",)
_AT_ONCE_S = 0.001


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
        self._children: set[int] = set()
        self._next_look_s = 0.0

    def bind(self, timeout_s: float = 10.0) -> bool:
        """Become the run directory's host and listen. Return False if another host answers there.

        Raises DeviceError if neither happens within ``timeout_s``.
        """
        path = self._run.path / SOCKET_NAME
        deadline = time.monotonic() + timeout_s
        lock = open_own(self._run.path / "host.lock", os.O_RDWR | os.O_CREAT)
        while not lock_until(lock, min(deadline, time.monotonic() + _LOOK_FOR_HOST_S)):
            if _answers(path):
                os.close(lock)
                return False
            if time.monotonic() > deadline:
                os.close(lock)
                raise DeviceError(f"{path}: another device host has the lock but does not answer")
        self._lock = lock
        me = Process.of(os.getpid())
        known = {"pid": os.getpid(), "start_time": me and me.start_time}
        (self._run.path / HOST_PID_NAME).write_text(json.dumps(known))
        self._listener = wire.listen(path)
        self._socket_inode = os.stat(path).st_ino
        return True

    def run(self) -> None:
        """Serve requests until SIGTERM, or until the socket cannot be reached any more."""
        assert self._listener is not None, "bind first"
        self._signals = _settle_in()
        if self._opener is open_configured:
            _warm_up(_WARM, [kinds.best()])
            Settings.from_json("{}")  # looks up the types of all settings
            native.state()  # imports the compiled code, if there is any
            self._to_warm = _WARM_LATER
        self._listener.setblocking(False)
        while True:
            poller = select.poll()
            poller.register(self._signals, select.POLLIN)
            if len(self._children) < MAX_REQUESTS:
                poller.register(self._listener, select.POLLIN)
            events = poller.poll(self._pause_s() * 1000)
            signals = self._signals.come()
            if signal.SIGTERM in signals:
                return
            if signal.SIGCHLD in signals and self._reap():
                self._next_look_s = 0.0
            if any(fd == self._listener.fileno() for fd, _ in events):
                self._accept(self._listener)
            elif self._to_warm:
                _warm_up(self._to_warm, kinds.every())
                self._to_warm = ()
            elif self._is_unreachable():
                return
            if time.monotonic() >= self._next_look_s:
                self._look_for_waiting()

    def _pause_s(self) -> float:
        if self._to_warm:
            return _AT_ONCE_S
        return max(0.0, min(IDLE_CHECK_S, self._next_look_s - time.monotonic()))

    # Devices whose processes were forked by another host have no parent here, so their deaths send no signal.
    def _look_for_waiting(self) -> None:
        pause_s = IDLE_CHECK_S
        for directory in self._run.device_directories():
            record = DeviceRecord.load(directory)
            if record is None or not stays_without_server(record):
                continue
            pause_s = WAITING_CHECK_S
            if is_revivable(directory, record):
                self._fork(partial(self._revive, directory))
        self._next_look_s = time.monotonic() + pause_s

    def _fork(self, run: Callable[[], None]) -> str:
        try:
            self._children.add(fork_to(run))
        except OSError as error:  # no memory, or too many processes: may work later
            return f"cannot fork: {error.strerror}"
        return ""

    # Returns True if a process was killed: its device may have no other process.
    def _reap(self) -> bool:
        killed = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return killed
            if pid == 0:
                return killed
            self._children.discard(pid)
            if os.WIFSIGNALED(status):
                log.error("process %d died by signal %d", pid, os.WTERMSIG(status))
                killed = True

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
            trouble = self._fork(partial(self._answer, connection))
            if trouble:
                _refuse(connection, trouble)

    # Returns True if the run directory was removed, or another host took its place.
    def _is_unreachable(self) -> bool:
        try:
            return os.stat(self._run.path / SOCKET_NAME).st_ino != self._socket_inode
        except OSError:
            return True

    def _answer(self, connection: socket.socket) -> None:
        self._leave_host()
        bound_memory(Settings().server_memory)  # priming opens an image
        self._requests().handle(connection)

    def _revive(self, directory: Path) -> None:
        self._leave_host()
        self._installed.close()
        try:
            self._requests().revive(directory)
        except DeviceError as error:
            log.error("%s: its users wait: %s", directory.name, error)

    def _requests(self) -> HostRequests:
        return HostRequests(self._run, self._opener, self._installed)

    # Runs in a child. The lock and the listener belong to the host alone: an open copy would keep them alive after
    # it.
    def _leave_host(self) -> None:
        assert self._listener is not None
        assert self._signals is not None
        self._signals.forget()
        self._listener.close()
        os.close(self._lock)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def _refuse(connection: socket.socket, reason: str) -> None:
    log.error("request refused: %s", reason)
    try:  # closing with the request unread could lose the answer
        wire.receive(connection, _TROUBLE_PAUSE_S, OF_HOST_CLIENT)
    except DeviceError:
        pass
    try:
        wire.send(connection, Failed(reason))
    except OSError as error:
        log.warning("client gone before its answer: %s", error.strerror)


# A host started by a device's server inherits that server's protection and signal mask: the kernel would spare all
# servers, and the host would not hear of SIGTERM.
def _settle_in() -> Signals:
    signals = Signals(signal.SIGCHLD, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    abi.set_process_name("obdlab-host")
    unprotect()
    try:
        abi.prctl(abi.PR_SET_CHILD_SUBREAPER, 1)
    except OSError as error:
        log.info("no subreaper: %s", error)
    return signals


def _warm_up(names: Iterable[str], found: Iterable[Kind]) -> None:
    present = [kind.implementation for kind in found if kind.implementation and not kind.missing()]
    for name in (*names, *present):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector must not touch, and so unshare, the memory that all servers share


def _answers(path: Path) -> bool:
    try:
        wire.connect(path, 2.0).close()
    except OSError:
        return False
    return True
