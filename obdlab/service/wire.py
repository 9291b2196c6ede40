"""How host and clients talk: one JSON object per line over a unix socket, one request and one answer a connection."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

#: No message is longer.
_LIMIT = 1 << 20


class ConnectionLostError(DeviceError):
    """The other side went away before its message was complete."""


def connect(path: Path, timeout_s: float) -> socket.socket:
    """Connect to a unix socket of any path length. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
        try:  # sun_path holds 108 bytes; a directory's descriptor makes every path short
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
    except BaseException:
        connection.close()
        raise
    return connection


def listen(path: Path) -> socket.socket:
    """Listen on a unix socket (mode 0600) that replaces any older one at once: nobody sees it deaf."""
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


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    """Receive one message within ``timeout_s``. Raises DeviceError if it does not come or is none."""
    deadline = time.monotonic() + timeout_s
    data = bytearray()
    while not data.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeviceError(f"no answer within {timeout_s:g} s")
        connection.settimeout(remaining)
        try:
            part = connection.recv(1 << 16)
        except TimeoutError:
            continue
        except OSError as error:
            raise ConnectionLostError(f"connection lost: {error.strerror}") from error
        if not part:
            raise ConnectionLostError(f"connection ended in the middle of a message (got {len(data)} bytes)")
        if len(data) + len(part) > _LIMIT:
            raise DeviceError(f"a message longer than {_LIMIT} bytes")
        data += part
    try:
        message = json.loads(data)
    except ValueError as error:
        raise DeviceError(f"a message that is no JSON (got {bytes(data[:80])!r})") from error
    if not isinstance(message, dict):
        raise DeviceError(f"a message that is no JSON object (got {bytes(data[:80])!r})")
    return message
