"""A device's server as its keeper sees it: the process, its channel, and how it ended."""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket

    from obdlab.service.deaths import Start

log = logging.getLogger(__name__)

#: No message of a server is longer.
_LIMIT = 1 << 20


class ServerProcess:
    """A process that this keeper forked, or adopted after the death of the keeper that did.

    ``number`` is 0 for the server that made the device, or took its place; others help it. Raises OSError if the
    process is gone.
    """

    def __init__(self, pid: int, channel: socket.socket, number: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.channel = channel
        self.number = number
        #: Since when it serves; None before it is ready.
        self.start: Start | None = None
        #: Why it cannot serve, by its own word.
        self.error = ""
        self._received = bytearray()

    def listen(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come, or None if no more will: its end of the channel is closed.

        The channel of a server that sends anything but messages is not read any more.
        """
        try:
            part = self.channel.recv(1 << 16)
        except ConnectionResetError:  # it died before it read the host's answer on an adopted channel
            part = b""
        if not part:
            return None
        self._received += part
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if len(rest) > _LIMIT or not all(isinstance(each, dict) for each in messages):
            log.error("server %d: malformed messages on its channel: not read any more", self.pid)
            return None
        return messages

    def last_messages(self) -> list[dict[str, Any]]:
        """Return what a dead server still said."""
        os.set_blocking(self.channel.fileno(), False)
        messages: list[dict[str, Any]] = []
        with suppress(BlockingIOError, OSError):
            while (more := self.listen()) is not None:
                messages += more
        return messages

    def kill(self) -> None:
        """Kill it, if it is there."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def bury(self) -> int | None:
        """Reap a dead server and let go of it; return its wait status, None if another process is its parent."""
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            return None
        finally:
            self.channel.close()
            os.close(self.pidfd)
        return status


def killed_by(status: int | None) -> int | None:
    """Return the signal of a wait status, 0 if the process exited, None if the status is not known."""
    if status is None:
        return None
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def how_ended(status: int | None) -> str:
    """Say what a wait status means."""
    if status is None:
        return "in a way that only its parent knows"
    if os.WIFSIGNALED(status):
        return f"by signal {os.WTERMSIG(status)}"
    return f"with status {os.waitstatus_to_exitcode(status)}"
