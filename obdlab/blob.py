"""The one interface of the data path: something of a known size that is read by position.

A device, a stack of layers, a layer, a ZFile, a cache and a registry blob are all Blobs wrapping Blobs, so a
recorder or a fault injector is just one more wrapper.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self, overload

from obdlab.errors import OutOfRangeError

if TYPE_CHECKING:
    from types import TracebackType

Buffer = bytes | bytearray | memoryview


class Blob(ABC):
    """Read-only bytes of a fixed size. All methods may be called from several threads at once."""

    #: Name of this blob in error messages: a path, a URL, a digest.
    name: str = ""

    @property
    @abstractmethod
    def size(self) -> int:
        """Length in bytes."""

    @abstractmethod
    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``.

        Raises OutOfRangeError if the range is not inside the blob, and another ObdlabError if the bytes cannot be
        read or fail their checksum. Never returns fewer bytes, or wrong ones.
        """

    def evict(self, offset: int, length: int) -> None:  # noqa: B027 - doing nothing is right for most blobs
        """Forget any cached copy of the range, so that the next read goes to the origin of the bytes.

        Called by a reader whose checksum failed, before it tries once more.
        """

    def close(self) -> None:  # noqa: B027 - most wrappers own nothing but the blob below
        """Release what the blob holds, and the blobs below it. Closing twice is allowed."""

    def __len__(self) -> int:
        return self.size

    def __bool__(self) -> bool:
        return True  # an empty blob is still one

    @overload
    def __getitem__(self, key: int) -> int: ...

    @overload
    def __getitem__(self, key: slice) -> bytes: ...

    def __getitem__(self, key: int | slice) -> int | bytes:
        """Return bytes as a bytes object does: ``blob[a:b]`` is clipped to the blob, ``blob[a]`` is a number."""
        if isinstance(key, slice):
            begin, end, step = key.indices(self.size)
            if step == 1:
                return self.read_at(begin, end - begin) if begin < end else b""
            at = range(begin, end, step)
            if not at:
                return b""
            low = min(at[0], at[-1])
            return self.read_at(low, abs(at[-1] - at[0]) + 1)[::step]
        offset = operator.index(key)
        if offset < 0:
            offset += self.size
        if not 0 <= offset < self.size:
            raise IndexError(f"{self.name}: no byte {key} (size {self.size})")
        return self.read_at(offset, 1)[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WritableBlob(Blob):
    """A blob that can be changed in place. Its size is fixed unless a subclass says otherwise."""

    @abstractmethod
    def write_at(self, offset: int, data: Buffer) -> None:
        """Store all of ``data`` at ``offset``, or raise."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """Make the range read as zeros, freeing its space where possible."""

    @abstractmethod
    def flush(self) -> None:
        """Return once everything written before is on stable storage."""


class MemoryBlob(Blob):
    """A blob over bytes in memory: small files read whole, and the reference in tests."""

    def __init__(self, data: Buffer, name: str = "memory") -> None:
        self._data = memoryview(data)
        self.name = name

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(self, offset, length)
        return bytes(self._data[offset : offset + length])


def check_range(blob: Blob, offset: int, length: int) -> None:
    """Raise OutOfRangeError unless ``[offset, offset + length)`` lies inside the blob."""
    if offset < 0 or length < 0 or offset + length > blob.size:
        raise OutOfRangeError(
            f"{blob.name}: range outside the blob (got [{offset}, {offset + length}), wanted inside [0, {blob.size}))"
        )
