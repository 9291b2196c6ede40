"""The reading side of an HTTP server's connection, with a deadline for each request as a whole."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket


class DeadlineReader(io.RawIOBase):
    """Reads from a connection. Once a request has begun to arrive, all of it must arrive within ``request_s``.

    Before that the connection may be silent for ``idle_s``. Raises TimeoutError.
    """

    def __init__(self, connection: socket.socket, *, request_s: float, idle_s: float) -> None:
        self._connection = connection
        self._request_s, self._idle_s = request_s, idle_s
        self._deadline: float | None = None

    def expect(self) -> None:
        """A new request may begin now."""
        self._deadline = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._idle_s if self._deadline is None else self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not come in in time")
        self._connection.settimeout(left)
        length = self._connection.recv_into(buffer)
        if self._deadline is None:
            self._deadline = time.monotonic() + self._request_s
        return length
