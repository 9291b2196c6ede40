"""The protocol of host, servers and clients: a JSON object per line over a unix socket, one request a connection."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

#: Longest message.
_LIMIT = 1 << 20
_LONGEST_S = 86400.0


# struct ucred: pid, uid, gid
_UCRED = struct.Struct("=3i")
# struct timeval: seconds, microseconds
_TIMEVAL = struct.Struct("ll")


class Peer(NamedTuple):
    """The credentials of a process at the time it connected."""

    pid: int
    uid: int
    gid: int


class NoAnswerError(DeviceError):
    """The other side did not answer. It may have done the request or not."""


class ConnectionLostError(DeviceError):
    """The other side went away before its message was complete."""


def connect(path: Path, timeout_s: float) -> socket.socket:
    """Connect to a unix socket of any path length, waiting while its queue is full. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Python's own timeout makes the connect non-blocking, which fails at once when the queue is full.
        interval = _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1_000_000) or 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)
        directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
        try:  # sun_path holds 108 bytes; a directory's descriptor makes every path short
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
        except BlockingIOError as error:
            raise TimeoutError(errno.ETIMEDOUT, f"its queue is full for {timeout_s:.3g} s") from error
        finally:
            os.close(directory)
        connection.settimeout(timeout_s)
    except BaseException:
        connection.close()
        raise
    return connection


def listen(path: Path) -> socket.socket:
    """Listen on a unix socket (mode 0600) that replaces an older one atomically: clients always find a listener."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
        try:
            new = f"/proc/self/fd/{directory}/{path.name}.new"
            if os.path.lexists(new):
                os.unlink(new)
            listener.bind(new)
            os.chmod(new, 0o600)
            listener.listen(128)
            os.rename(new, f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
    except BaseException:
        listener.close()
        raise
    return listener


def peer_of(connection: socket.socket) -> Peer:
    """Return the process at the other end of a unix socket, from the kernel. Raises OSError."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message."""
    connection.sendall(json.dumps(message).encode() + b"\n")


class Messages:
    """The messages received on a connection, one by one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._data = bytearray()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Return the next message. Raises DeviceError if none arrives within ``timeout_s``, or if it is malformed."""
        deadline = time.monotonic() + timeout_s
        while (end := self._data.find(b"\n")) < 0:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DeviceError(f"no answer within {timeout_s:g} s")
            self._receive_some(remaining)
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        return _parsed(line)

    def _receive_some(self, timeout_s: float) -> None:
        self._connection.settimeout(timeout_s)
        try:
            part = self._connection.recv(1 << 16)
        except TimeoutError:
            return
        except OSError as error:
            raise ConnectionLostError(f"connection lost: {error.strerror}") from error
        if not part:
            raise ConnectionLostError(f"connection ended in the middle of a message (got {len(self._data)} bytes)")
        if len(self._data) + len(part) > _LIMIT:
            raise DeviceError(f"a message longer than {_LIMIT} bytes")
        self._data += part


def receive(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    """Receive the only message within ``timeout_s``. Raises DeviceError if it does not arrive or is malformed."""
    return Messages(connection).receive(timeout_s)


def timeout_of(request: dict[str, Any]) -> float:
    """Return a request's ``timeout_s``. Raises DeviceError unless it is a number of seconds up to a day."""
    value = request.get("timeout_s")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LONGEST_S:
        raise DeviceError(f"{request.get('op')} request: malformed timeout_s (got {value!r})")
    return float(value)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"a message that is no JSON (got {line[:80]!r})") from error
    if not isinstance(message, dict):
        raise DeviceError(f"a message that is no JSON object (got {line[:80]!r})")
    return message
