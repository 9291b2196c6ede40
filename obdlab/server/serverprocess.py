"""The keeper's view of a device's server: its task, the process, its channel, and how it ended."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.devices import kinds
from obdlab.errors import DeviceError
from obdlab.server import wire
from obdlab.server.messages import OF_SERVER

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from obdlab.server.deaths import Start
    from obdlab.server.messages import Failed, Message

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """A server's task."""

    #: Connection that the device's keeper holds too (``Kind.connect``): an open /dev/fuse, or NO_CONNECTION.
    connection: int
    #: The device, if it exists and this server goes on with it.
    path: Path | None = None
    #: 0: the server of the device; other numbers are helpers while it is busy.
    number: int = 0
    #: Number of servers that the device had before.
    restarts: int = 0
    #: Name of the device's kind.
    kind: str = kinds.FIRST
    #: Settings of the device's plan, as ``Settings.to_json`` wrote them.
    settings: str = "{}"


class ServerProcess:
    """A process that this keeper forked, or adopted after its own keeper's death.

    ``number`` is 0 for the device's server; other numbers are helpers. Raises OSError if the process is gone.
    """

    def __init__(self, pid: int, channel: socket.socket, number: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.channel = channel
        self.number = number
        #: When it became ready; None before that.
        self.start: Start | None = None
        #: The server's own reason why it cannot serve.
        self.failed: Failed | None = None
        self._lines = wire.Lines()

    def listen(self) -> list[Message] | None:
        """Return the received messages, or None if its end of the channel is closed.

        A server that sends a malformed message is not read any more.
        """
        try:
            part = self.channel.recv(1 << 16)
        except ConnectionResetError:  # it died before it read the host's answer on an adopted channel
            part = b""
        if not part:
            return None
        messages = []
        try:
            self._lines.add(part)
            while (line := self._lines.take()) is not None:
                messages.append(wire.decode(line, OF_SERVER))
        except DeviceError as error:
            log.error("server %d: malformed message on its channel, which is not read any more: %s", self.pid, error)
            return None
        return messages

    def last_messages(self) -> list[Message]:
        """Return a dead server's unread messages."""
        os.set_blocking(self.channel.fileno(), False)
        messages: list[Message] = []
        with suppress(BlockingIOError, OSError):
            while (more := self.listen()) is not None:
                messages += more
        return messages

    def kill(self) -> None:
        """Kill it, unless it is gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def bury(self) -> int | None:
        """Reap a dead server and close its descriptors. Return its wait status.

        Returns None if another process is its parent.
        """
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            return None
        finally:
            self.channel.close()
            os.close(self.pidfd)
        return status


def killed_by(status: int | None) -> int | None:
    """Return the signal of a wait status, 0 if the process exited, None if the status is unknown."""
    if status is None:
        return None
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def how_ended(status: int | None) -> str:
    """Describe a wait status in words."""
    if status is None:
        return "in a way that only its parent knows"
    if os.WIFSIGNALED(status):
        return f"by signal {os.WTERMSIG(status)}"
    return f"with status {os.waitstatus_to_exitcode(status)}"
