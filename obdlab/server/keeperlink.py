"""A server's link to its device's keeper, and its way to another keeper when its own was killed.

Keeper and server both hold the device's connection, and each replaces the other: the keeper forks servers; the server
has the device host, started if need be, fork a keeper that adopts it. The device ends only if both die before one of
them is replaced. Its users then get I/O errors at once, because the last holder of the connection is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from obdlab.devices import kinds
from obdlab.errors import DeviceError, ObdlabError
from obdlab.server import wire
from obdlab.server.client import DeviceService
from obdlab.server.messages import Busy
from obdlab.server.rundir import DeviceRecord
from obdlab.settings.settings import Settings
from obdlab.system.pauses import backoff_s

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.server.messages import Description, Message
    from obdlab.server.serverprocess import Task

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_HELPER_END_S = 5.0


class KeeperLink:
    """Sends messages to the keeper, one JSON object a line, and notices the keeper's end. Thread-safe."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def say(self, message: Message) -> bool:
        """Send one message. Return False if the keeper is gone."""
        try:
            with self._lock:
                wire.send(self._channel, message)
        except OSError:
            return False
        return True

    def say_busy(self) -> None:
        """Ask for a helper."""
        self.say(Busy(True))

    def wait_for_end(self) -> None:
        """Return when the keeper is gone."""
        with suppress(OSError):
            while self._channel.recv(1):
                pass

    def renew(self, channel: socket.socket) -> None:
        """Go on with another keeper."""
        channel.settimeout(None)
        with self._lock:
            self._channel.close()
            self._channel = channel


class KeeperSeeker:
    """Gets a server another keeper, as often as needed, until the device has ended.

    ``describe`` returns the server's description of the device.
    """

    def __init__(self, link: KeeperLink, directory: Path, task: Task, describe: Callable[[], Description]) -> None:
        self._link = link
        self._directory = directory
        self._task = task
        self._describe = describe
        self._kind = kinds.find(task.kind)
        self._service = DeviceService(directory.parents[1], Settings.from_json(task.settings))

    def start(self) -> None:
        """Watch the link in a thread of its own."""
        threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._link.wait_for_end()
            if self._has_ended():
                return
            log.error("%s: its keeper is gone: asking the device host for another one", self._directory.name)
            try:
                self._end_helpers()
                self._seek()
            except DeviceError as error:
                log.error("%s: %s", self._directory.name, error)
                return

    def _has_ended(self) -> bool:
        return self._kind.has_ended(self._directory, self._task.connection)

    # Requests of a helper that dies without a keeper would wait for ever. The helpers died with the keeper, or do
    # now.
    def _end_helpers(self) -> None:
        record = DeviceRecord.load(self._directory)
        if record is None:
            return
        if record.pid == os.getpid():
            for helper in record.servers()[1:]:
                helper.signal(signal.SIGKILL)
                helper.end(_HELPER_END_S)
        elif record.process.alive:
            raise DeviceError(f"server {record.pid} serves the device; this one, {os.getpid()}, was to replace it")
        self._kind.send_again(self._task.connection)

    def _seek(self) -> None:
        failures = 0
        while not self._has_ended():
            try:
                if not self._directory.is_dir():
                    raise DeviceError("its directory was removed")  # a host would make the run directory again
                self._link.renew(self._service.ask_for_keeper(self._directory.name, self._describe()))
            except ObdlabError as error:
                log.warning("%s: no keeper yet: %s", self._directory.name, error)
                time.sleep(backoff_s(failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S))
                failures += 1
            else:
                log.info("%s: has a keeper again", self._directory.name)
                return
