"""Breaking off an exchange with a registry from another thread, when its answer is no longer needed."""

from __future__ import annotations

import socket
import threading


class BrokenOffError(ConnectionAbortedError):
    """Another thread has broken off this thread's exchange."""


class Exchange:
    """The exchange of one thread with a registry, as other threads see it. Entering makes it the calling thread's."""

    __slots__ = ("_lock", "_outer", "broken_off", "socket")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outer: Exchange | None = None
        #: The socket that the thread waits for.
        self.socket: socket.socket | None = None
        self.broken_off = False

    def break_off(self) -> None:
        """Make the thread's current wait fail now, and all that follow."""
        with self._lock:
            self.broken_off = True
            if self.socket is None:
                return
            try:
                # Not SSLSocket's own shutdown: that would remove the TLS state under the thread that uses it.
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)
            except OSError:
                pass  # closed, or not connected yet

    def __enter__(self) -> None:
        self._outer = OF_THREAD.exchange
        OF_THREAD.exchange = self

    def __exit__(self, *_: object) -> None:
        OF_THREAD.exchange = self._outer
        with self._lock:
            self.socket = None  # it may serve another thread next

    def use(self, used: socket.socket) -> None:
        """Set the socket that the thread waits for. Raises BrokenOffError."""
        with self._lock:
            if self.broken_off:
                raise BrokenOffError("broken off")
            self.socket = used


class _OfThread(threading.local):
    exchange: Exchange | None = None


#: The exchange of the calling thread, if it can be broken off; an attribute, as every use of a socket looks it up.
OF_THREAD = _OfThread()


def is_broken_off() -> bool:
    """Return True if the calling thread's exchange was broken off."""
    exchange = OF_THREAD.exchange
    return exchange is not None and exchange.broken_off
