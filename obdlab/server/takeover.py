"""Takes a device over from the processes that serve it: an upgrade in place, or after its keeper was killed.

They need not cooperate, so they may run other code, or hang: the connection is duplicated out of one of them
(pidfd_getfd(2)), and they are killed once the new server is ready. The kernel then hands out their unanswered
requests again.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import kinds
from obdlab.errors import DeviceError
from obdlab.server.rundir import DeviceRecord
from obdlab.system import abi
from obdlab.system.processes import Process

if TYPE_CHECKING:
    import socket

    from obdlab.server.messages import Description

_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Orphan:
    """A running server whose keeper was killed."""

    channel: socket.socket
    #: The same description that a ready server sends.
    description: Description
    #: Digest of the code that it runs.
    code: str


class Former:
    """The previous processes of a device."""

    def __init__(self, record: DeviceRecord) -> None:
        self.record = record
        keeper = record.keeper
        self._keeper = keeper if keeper is not None and keeper.alive else None

    def connection(self) -> int:
        """Return a duplicate of the device's /dev/fuse descriptor. Raises DeviceError."""
        why = "none of its processes is alive"
        for process in filter(None, (self._keeper, self.record.process)):
            if process.alive:
                try:
                    return connection_of(process.pid)
                except OSError as error:
                    why = f"process {process.pid}: {error.strerror}"
        raise DeviceError(f"device {self.record.device_id}: cannot take it over ({why})")

    def make_way(self) -> None:
        """Let the next server start: a writable image, and most kinds of device, have one server at a time."""
        if self._keeper is not None:
            self._keeper.signal(signal.SIGSTOP)
        if not self.record.read_only or not kinds.find(self.record.kind).is_shared:
            self._end_servers()

    def end(self) -> None:
        """End all of them."""
        servers = self._servers()
        if self._keeper is not None:
            self._keeper.signal(signal.SIGKILL)
            self._keeper.end(_END_S)
        for process in servers:
            process.signal(signal.SIGKILL)
            process.end(_END_S)

    def go_on(self) -> None:
        """After a failed take-over, let them go on. The keeper replaces a server that made way."""
        if self._keeper is not None:
            self._keeper.signal(signal.SIGCONT)

    def _end_servers(self) -> None:
        for process in self._servers():
            process.signal(signal.SIGKILL)
            process.end(_END_S)

    # The record lists servers that were ready; a keeper may just have forked another one.
    def _servers(self) -> list[Process]:
        pids = {self.record.pid, *self.record.helpers}
        found = {self.record.process}
        if self._keeper is not None:
            try:
                path = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children")
                pids = {int(pid) for pid in path.read_text().split()}
            except OSError:  # a kernel without CONFIG_PROC_CHILDREN
                pass
        found |= {process for pid in pids if (process := Process.of(pid)) is not None}
        return [process for process in found if process.alive]


#: The part of a device that exists when its keeper starts.
There = Former | Orphan | DeviceRecord | None


def record_of(there: There) -> DeviceRecord | None:
    """Return the record that the processes before have left."""
    match there:
        case Former():
            return there.record
        case DeviceRecord():
            return there
    return None


def connection_of(pid: int) -> int:
    """Return a duplicate of a process's /dev/fuse descriptor. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/fuse":
                    return abi.pidfd_getfd(pidfd, int(number))
            except FileNotFoundError:  # closed meanwhile
                continue
    finally:
        os.close(pidfd)
    raise FileNotFoundError(2, "has no /dev/fuse open")
