"""Blobs for device tests: writable memory, one that fails, one that waits."""

from __future__ import annotations

import threading

from obdlab.blob import Buffer, MemoryBlob, WritableBlob, check_range
from obdlab.call import UNBOUND, Call
from obdlab.errors import SourceError


class MemoryWritable(WritableBlob):
    """A bytearray as a writable blob; counts flushes."""

    name = "memory"

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.flushes = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        return bytes(self.data[offset : offset + length])

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        check_range(self, offset, len(data))
        self.data[offset : offset + len(data)] = data

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        check_range(self, offset, length)
        self.data[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        self.flushes += 1


class Troubled(MemoryBlob):
    """Reads touching [at, at + 4096) raise; which error can be set."""

    def __init__(self, data: bytes, at: int, error: Exception | None = None) -> None:
        super().__init__(data)
        self.at = at
        self.error: Exception | None = error or SourceError("registry answered 500", blob="sha256:12", offset=at)

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if self.error is not None and offset < self.at + 4096 and self.at < offset + length:
            raise self.error
        return super().read_at(offset, length, call)


class Short(MemoryBlob):
    """A buggy blob: returns less than was asked for."""

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        return super().read_at(offset, length, call)[:-1]


class Gated(MemoryBlob):
    """Reads at or above ``at`` wait until the gate opens, as for a slow registry."""

    def __init__(self, data: bytes, at: int) -> None:
        super().__init__(data)
        self.at = at
        self.gate = threading.Event()
        self.waiting = threading.Semaphore(0)

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        if offset >= self.at:
            self.waiting.release()
            (call or UNBOUND).about_to_wait()
            assert self.gate.wait(60), "the test never opened the gate"
        return super().read_at(offset, length, call)
