"""Bytes on their way to this host: one transfer, any number of readers, each from the first byte on."""

from __future__ import annotations

import threading
import time


class Transfer:
    """The bytes ``[begin, end)`` of a blob, which come once and in order. Thread-safe.

    One thread adds checked bytes. Readers that come later get all that has come before at once.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        #: End of the bytes that have come.
        self.good = begin
        self._data = bytearray(end - begin)
        self._error: Exception | None = None
        self._over = False
        self._changed = threading.Condition()

    def add(self, data: bytes | memoryview) -> None:
        """Append checked bytes and wake the readers."""
        at = self.good - self.begin
        if at + len(data) > len(self._data):
            raise ValueError(f"transfer of {len(self._data)} bytes got {at + len(data)}")
        self._data[at : at + len(data)] = data
        with self._changed:
            self.good += len(data)
            self._changed.notify_all()

    def finish(self, error: Exception | None = None) -> None:
        """End the transfer; readers of bytes that have not come get the error."""
        with self._changed:
            self._error, self._over = error, True
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """True if nothing more will come."""
        return self._over

    def after(self, offset: int, deadline: float) -> bytes:
        """Wait for bytes from ``offset`` on and return all that have come.

        Raises the transfer's error, or TimeoutError at the deadline (time.monotonic).
        """
        with self._changed:
            while self.good <= offset and not self._over:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError("no bytes within the deadline")
            good = self.good
        if good > offset:
            return bytes(memoryview(self._data)[offset - self.begin : good - self.begin])
        raise self._error or TimeoutError("transfer ended too soon")

    def content(self) -> bytes:
        """Return all that has come so far."""
        return bytes(memoryview(self._data)[: self.good - self.begin])
