"""The protocol of host, servers and clients: a JSON object per line over a unix socket, one request a connection."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args, get_type_hints

import msgspec

from obdlab.errors import DeviceError
from obdlab.records import known_fields

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from obdlab.server.messages import Message

T = TypeVar("T")

#: Longest message.
_LIMIT = 1 << 20

# struct ucred: pid, uid, gid
_UCRED = struct.Struct("=3i")
# struct timeval: seconds, microseconds
_TIMEVAL = struct.Struct("ll")


class Peer(NamedTuple):
    """The credentials of a process at the time it connected."""

    pid: int
    uid: int
    gid: int


class NoAnswerError(DeviceError, code="no-answer"):
    """The other side did not answer. It may have done the request or not."""


class ConnectionLostError(DeviceError, code="connection-lost"):
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


def encode(message: Message) -> bytes:
    """Return a message's line."""
    return msgspec.json.encode(message) + b"\n"


def send(connection: socket.socket, message: Message) -> None:
    """Send one message."""
    connection.sendall(encode(message))


class Lines:
    """Cuts a stream of bytes into lines of bounded length."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def add(self, part: bytes) -> None:
        """Append received bytes. Raises DeviceError if the unread ones are too many."""
        if len(self._data) + len(part) > _LIMIT:
            raise DeviceError(f"a message longer than {_LIMIT} bytes")
        self._data += part

    def take(self) -> bytes | None:
        """Return the next line, or None while it is incomplete."""
        end = self._data.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        return line


class Messages:
    """The messages received on a connection, one by one, each of one of ``kinds``."""

    def __init__(self, connection: socket.socket, kinds: Sequence[type[Message]]) -> None:
        self._connection = connection
        self._kinds = kinds
        self._lines = Lines()

    def receive(self, timeout_s: float) -> Message:
        """Return the next message. Raises DeviceError if none arrives within ``timeout_s``, or if it is malformed."""
        deadline = time.monotonic() + timeout_s
        while (line := self._lines.take()) is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DeviceError(f"no answer within {timeout_s:g} s")
            self._receive_some(remaining)
        return decode(line, self._kinds)

    def _receive_some(self, timeout_s: float) -> None:
        self._connection.settimeout(timeout_s)
        try:
            part = self._connection.recv(1 << 16)
        except TimeoutError:
            return
        except OSError as error:
            raise ConnectionLostError(f"connection lost: {error.strerror}") from error
        if not part:
            raise ConnectionLostError(f"connection ended in the middle of a message (got {len(self._lines)} bytes)")
        self._lines.add(part)


def receive(connection: socket.socket, timeout_s: float, kinds: Sequence[type[Message]]) -> Message:
    """Receive the only message within ``timeout_s``. Raises DeviceError if it does not arrive or is malformed."""
    return Messages(connection, kinds).receive(timeout_s)


def decode(line: bytes, kinds: Sequence[type[Message]]) -> Message:
    """Return a line's message. Raises DeviceError if it is malformed or of another kind."""
    try:
        values = msgspec.json.decode(line)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"a message that is no JSON (got {line[:80]!r})") from error
    if not isinstance(values, dict):
        raise DeviceError(f"a message that is no JSON object (got {line[:80]!r})")
    for kind in kinds:
        name, wanted = _mark_of(kind)
        if name is None or (name in values and wanted in (None, values[name])):
            return typed({key: value for key, value in values.items() if wanted is None or key != name}, kind)
    if any(kind.__struct_config__.tag_field for kind in kinds):
        raise DeviceError(f"unknown request (got {_shortened(values.get('op'))})")
    raise DeviceError(f"unknown message (got {_shortened(sorted(values))})")


# The key by which messages of a kind are recognised, and its value if that matters.
def _mark_of(kind: type[Message]) -> tuple[str | None, str | None]:
    config = kind.__struct_config__
    if config.tag_field is not None:
        return config.tag_field, str(config.tag)
    return next(iter(kind.__struct_fields__), None), None


def typed(values: Any, kind: type[T]) -> T:
    """Return parsed JSON as a value of a type. Raises DeviceError if it is malformed.

    Fields of later versions are left out and logged.
    """
    try:
        return msgspec.convert(_known(values, kind), kind)
    except msgspec.ValidationError as error:
        raise DeviceError(f"{_name_of(kind)}: {error}") from error


def _known(values: Any, kind: Any) -> Any:
    if not isinstance(values, dict) or not _is_record(kind):
        return values
    known = known_fields(kind, values)
    return known | {name: _known(known[name], inner) for name, inner in _records_in(kind) if name in known}


def _is_record(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, msgspec.Struct))


@functools.cache
def _records_in(kind: type[Any]) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(name, each) for name, hint in hints.items() for each in (hint, *get_args(hint)) if _is_record(each)]


def _name_of(kind: type[Any]) -> str:
    config = getattr(kind, "__struct_config__", None)
    return f"{config.tag} request" if config is not None and config.tag is not None else f"{kind.__name__} message"


def _shortened(value: object) -> str:
    return repr(value)[:80]
