"""The one interface of the data path: something of a known size that is read by position.

A stack of layers, a layer, a ZFile, a cache and a registry blob are all Blobs wrapping Blobs, so a recorder or a
fault injector is just one more: a :class:`Wrapper`. Code that needs a certain blob of a chain, or the place of some
bytes in it, follows :attr:`Blob.below` (:func:`find`, :func:`range_in`), and so passes wrappers.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, overload

from obdlab.closing import Closing
from obdlab.errors import OutOfRangeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.call import Call


Buffer = bytes | bytearray | memoryview


class LinkSpeed(Protocol):
    """Measurements of the link to the origin of a blob's bytes; both are 0 as long as they are unknown."""

    #: Wait for an answer, in seconds, and the bytes that would arrive in that time.
    wait_s: float
    bytes_per_wait: float


class Descriptor(Protocol):
    """An open file's descriptor, not closed as long as this object lives."""

    number: int


class OpenFile(Protocol):
    """A local file that its blob has open."""

    @property
    def descriptor(self) -> Descriptor | None:
        """The descriptor; None once the blob is closed."""


class ByteStream(Protocol):
    """A range of a blob, read forwards as it arrives, by one thread."""

    #: Offset of the next byte in the blob.
    position: int

    def read(self, length: int, call: Call | None = None) -> bytes:
        """Return exactly the next ``length`` bytes, on the terms of the ``call``.

        Raises as :meth:`Blob.read_at` does; the stream is over then.
        """

    def close(self) -> None:
        """Give up the unread rest."""


class Blob(Closing):
    """Read-only bytes of a fixed size. All methods may be called from several threads at once."""

    #: Name of this blob in error messages: a path, a URL, a digest.
    name: str = ""
    #: The blob that this one is a view of: its bytes as they are, a part of them, or unpacked. None if there is no
    #: such blob, or several.
    below: Blob | None = None

    @property
    @abstractmethod
    def size(self) -> int:
        """Length in bytes."""

    @abstractmethod
    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Return exactly ``length`` bytes from ``offset``, on the terms of the ``call``.

        A blob that reads from others hands the call on with each read. Raises OutOfRangeError if the range is not
        inside the blob, and another ObdlabError if the bytes cannot be read or fail their checksum. Never returns
        fewer bytes, or wrong ones.
        """

    def read_into(self, offset: int, out: memoryview, call: Call | None = None) -> None:
        """Fill ``out``, flat and writable bytes, with those from ``offset`` on: :meth:`read_at` without its copy.

        By default by :meth:`read_at`, so that a wrapper need only override that. Raises as it does; ``out`` may hold
        anything then.
        """
        data = self.read_at(offset, len(out), call)
        if len(data) != len(out):
            raise RuntimeError(f"read_at returned {len(data)} of {len(out)} bytes")
        out[:] = data

    def map_range(self, begin: int, end: int) -> tuple[int, int]:
        """Return the range ``[begin, end)`` of the blob :attr:`below` that a read of this ``[begin, end)`` needs.

        By default the same. Reads nothing. Raises OutOfRangeError if the range is not inside the blob.
        """
        check_range(self, begin, end - begin)
        return begin, end

    def piece(self, offset: int) -> tuple[int, int] | None:
        """Return the range around a byte that must be decoded as a whole to read the byte; None without such ranges.

        A cache above keeps all of it. Reads nothing.
        """
        return None

    def stream(self, offset: int, length: int, call: Call | None = None) -> ByteStream | None:
        """Request a range by one request, to be read as it arrives; the caller closes the stream.

        The ``call`` has the terms of the request; each read of the stream has its own.

        None if this blob has no such requests: then use :meth:`read_at`. Raises as :meth:`read_at` does.
        """
        check_range(self, offset, length)
        return None

    def in_file(self) -> tuple[OpenFile, int] | None:
        """Return the local file that holds these bytes as they are, and where; None if reads must come through here.

        For readers that let compiled code read the file. A wrapper has None: it is there to see reads.
        """
        return None

    @property
    def link(self) -> LinkSpeed | None:
        """Measurements of the link to the origin of the bytes; None if they are on this machine."""
        return None if self.below is None else self.below.link

    def statistics(self) -> dict[str, int]:
        """Return counters since the blob was opened; empty if nothing is counted."""
        return {} if self.below is None else self.below.statistics()

    def evict(self, offset: int, length: int) -> None:
        """Forget any cached copy of the range, so that the next read goes to the origin of the bytes.

        Called by a reader whose checksum failed, before it tries once more. A cache that has compared all of the
        bytes with their digest keeps them.
        """
        if self.below is not None:
            begin, end = self.map_range(offset, offset + length)
            if begin < end:
                self.below.evict(begin, end - begin)

    def close(self) -> None:
        """Release what the blob holds, and the blobs below it. Closing twice is allowed."""
        if self.below is not None:
            self.below.close()

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


class WritableBlob(Blob):
    """A blob that can be changed in place. Its size is fixed unless a subclass says otherwise."""

    @abstractmethod
    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        """Store all of ``data`` at ``offset``, or raise. Blobs below are read on the terms of the ``call``."""

    @abstractmethod
    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        """Make the range read as zeros, freeing its space where possible."""

    @abstractmethod
    def flush(self) -> None:
        """Return once everything written before is on stable storage."""


class Wrapper(Blob):
    """Passes everything on to the blob below: the base of recorders and fault injectors.

    Bytes are read by :meth:`read_at` and by the :meth:`stream` that it passes on. A subclass that overrides one to
    see or to refuse reads overrides the other, too; without streams (None), the same bytes cost more requests. A
    wrapper of a writable blob is a :class:`WritableWrapper`.
    """

    below: Blob

    def __init__(self, below: Blob) -> None:
        self.name = below.name
        self.below = below

    @property
    def size(self) -> int:
        return self.below.size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        return self.below.read_at(offset, length, call)

    def piece(self, offset: int) -> tuple[int, int] | None:
        return self.below.piece(offset)

    def stream(self, offset: int, length: int, call: Call | None = None) -> ByteStream | None:
        return self.below.stream(offset, length, call)


class WritableWrapper(Wrapper, WritableBlob):
    """A :class:`Wrapper` of a writable blob."""

    below: WritableBlob

    def __init__(self, below: WritableBlob) -> None:
        super().__init__(below)

    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        self.below.write_at(offset, data, call)

    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        self.below.discard(offset, length, call)

    def flush(self) -> None:
        self.below.flush()


class MemoryBlob(Blob):
    """A blob over bytes in memory: small files read whole, and the reference in tests."""

    def __init__(self, data: Buffer, name: str = "memory") -> None:
        self._data = memoryview(data)
        self.name = name

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        return bytes(self._data[offset : offset + length])


def check_range(blob: Blob, offset: int, length: int) -> None:
    """Raise OutOfRangeError unless ``[offset, offset + length)`` lies inside the blob."""
    if offset < 0 or length < 0 or offset + length > blob.size:
        raise OutOfRangeError(
            f"{blob.name}: range outside the blob (got [{offset}, {offset + length}), wanted inside [0, {blob.size}))"
        )


# -- chains of blobs -------------------------------------------------------------------------------------------------

#: Places of an image where :func:`obdlab.open_image` can put a wrapper, from the bottom up: the file or registry blob
#: of a layer; the same read through the block cache (registry blobs alone); the content of a ZFile; a layer's plain
#: LSMT file; the uncompressed tar that a turboOCI layer points into (the first two are those of its blob, too); the
#: whole disk.
Joint = Literal["origin", "cache", "zfile", "layer", "target", "stack"]

#: Returns the blob that takes the place of the one at a joint: the same one, or a wrapper of it.
Around = Callable[[Joint, Blob], Blob]

AnyBlob = TypeVar("AnyBlob", bound=Blob)


def unwrapped(_: Joint, blob: Blob) -> Blob:
    """Return the blob itself: an :data:`Around` that wraps nothing."""
    return blob


def chain(blob: Blob) -> Iterator[Blob]:
    """Yield the blob and those below it, from the top down."""
    below: Blob | None = blob
    while below is not None:
        yield below
        below = below.below


def find(blob: Blob, kind: type[AnyBlob]) -> AnyBlob | None:
    """Return the topmost blob of a kind in the chain that begins with ``blob``; None if there is no such blob."""
    return next((found for found in chain(blob) if isinstance(found, kind)), None)


def range_in(target: Blob, blob: Blob, begin: int, end: int) -> tuple[int, int]:
    """Return the range of ``target``, a blob of the chain, that a read of ``[begin, end)`` of ``blob`` needs.

    Raises ValueError if the target is not in the chain.
    """
    for step in chain(blob):
        if step is target:
            return begin, end
        begin, end = step.map_range(begin, end)
    raise ValueError(f"{blob.name}: {target.name} is not below it")
