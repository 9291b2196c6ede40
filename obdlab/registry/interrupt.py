"""Breaking off an exchange with a registry from another thread, when its answer is no longer needed."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_local = threading.local()


class BrokenOffError(ConnectionAbortedError):
    """Another thread has broken off this thread's exchange."""


class Exchange:
    """The exchange of one thread with a registry, as other threads see it."""

    __slots__ = ("_lock", "_socket", "broken_off")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.broken_off = False

    def break_off(self) -> None:
        """Make the thread's current wait fail now, and all that follow."""
        with self._lock:
            self.broken_off = True
            if self._socket is None:
                return
            try:
                # Not SSLSocket's own shutdown: that would remove the TLS state under the thread that uses it.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:
                pass  # closed, or not connected yet

    @contextmanager
    def of_thread(self) -> Iterator[None]:
        """Make this the exchange of the calling thread."""
        outer = getattr(_local, "exchange", None)
        _local.exchange = self
        try:
            yield
        finally:
            _local.exchange = outer
            with self._lock:
                self._socket = None  # it may serve another thread next

    def use(self, used: socket.socket) -> None:
        """Set the socket that the thread waits for. Raises BrokenOffError."""
        if self._socket is used and not self.broken_off:
            return
        with self._lock:
            if self.broken_off:
                raise BrokenOffError("broken off")
            self._socket = used


def exchange_of_thread() -> Exchange | None:
    """Return the calling thread's exchange, if it can be broken off."""
    return getattr(_local, "exchange", None)


def is_broken_off() -> bool:
    """Return True if the calling thread's exchange was broken off."""
    exchange = exchange_of_thread()
    return exchange is not None and exchange.broken_off
