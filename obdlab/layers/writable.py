"""The common interface of writable layers, for either way of keeping data."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from obdlab.closing import Closing
from obdlab.errors import OutOfRangeError, SourceError
from obdlab.formats.lsmt.index import SegmentIndex
from obdlab.formats.lsmt.layout import MAX_VIRTUAL_SIZE, SECTOR
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.seal import find_seal, undo_seal
from obdlab.layers.upperstate import State

if TYPE_CHECKING:
    import threading

    from obdlab.blob import Buffer
    from obdlab.call import Call
    from obdlab.formats.lsmt.index import Run
    from obdlab.formats.lsmt.layout import Header
    from obdlab.formats.lsmt.segmentmap import SegmentMap
    from obdlab.layers.layerfile import LayerFile
    from obdlab.states import StateOf

# Chunks of the map prepared for sealing while reads and writes wait: some milliseconds.
_CHUNKS_AT_ONCE = 16


class Upper(Closing):
    """A layer that can be written: the top of a :class:`~obdlab.layers.stack.WritableStack`.

    All methods may be called from several threads; overlapping writes must be ordered by the caller. I/O errors of
    the files are raised as SourceError. Data written before the last :meth:`flush` survives any crash. An open
    writable layer locks out every other opener of this package (SourceError there).
    """

    #: Unit of the ranges the layer holds, in bytes, counted from the disk's start.
    block_size: ClassVar[int]
    #: True if a write may cover a block partly; after reopening the layer then holds the whole block.
    takes_partial_blocks: ClassVar[bool]
    #: True if a discarded range still hides the layers below; else it reads as if it had never been written.
    discard_hides: ClassVar[bool]

    name: str
    header: Header
    _file: LayerFile
    _map: SegmentMap
    _lock: threading.Lock  # guards the map
    _state: StateOf[State]

    @property
    def state(self) -> State:
        """The layer's state at this moment."""
        return self._state.now

    @property
    def data(self) -> LayerFile:
        """The file that the index points into."""
        return self._file

    @property
    def index(self) -> SegmentIndex:
        """A frozen copy of the segments the layer holds now; valid until it changes."""
        with self._lock:
            segments = self._map.to_segments()
        return SegmentIndex(segments)

    def lookup(self, begin: int, end: int) -> list[Run]:
        """Return the layer's runs of the sectors ``[begin, end)``, as :meth:`SegmentIndex.lookup` does."""
        with self._lock:
            return self._map.lookup(begin, end)

    @abstractmethod
    def read_held(self, offset: int, length: int) -> list[tuple[int, bytes | None]]:
        """Return the disk's bytes in order, as pieces ``(length, data)``; data is None for ranges not held."""

    @abstractmethod
    def write_at(self, offset: int, data: Buffer, call: Call | None = None) -> None:
        """Store all of ``data``; this layer holds the sectors it touches from then on.

        A write past the end makes the disk larger. Raises OutOfRangeError for a part of a block if the layer needs
        whole ones.
        """

    @abstractmethod
    def discard(self, offset: int, length: int, call: Call | None = None) -> None:
        """Make the range read as zeros; see :attr:`discard_hides`. Raises as writing does."""

    @abstractmethod
    def flush(self) -> None:
        """Return once everything written before is on stable storage."""

    @abstractmethod
    def set_virtual_size(self, virtual_size: int) -> None:
        """Grow the disk. Raises OutOfRangeError if it would shrink or the size is not one a layer can have."""

    def prepare_to_seal(self) -> None:
        """Prepare the index for sealing in small steps, so that sealing itself is quick."""
        at = 0
        while True:
            with self._lock:
                at = self._map.freeze(at, _CHUNKS_AT_ONCE)
            if not at:
                return

    @abstractmethod
    def seal_file(self, *, marked: bool = False) -> None:
        """Append index and trailer to the data file, which makes it a sealed layer (overlaybd LSMT, sealed in place).

        All is on stable storage when this returns, in less time if the layer is ``marked`` (``SwitchMark``). The
        layer can still be read here; writing is refused. Raises FormatError, with nothing changed, if the layer has
        more segments than a sealed one may.
        """

    def seal(self) -> LsmtLayer:
        """Do :meth:`seal_file` and return the sealed layer. Both use the same open file; closing either closes it."""
        self.seal_file()
        try:
            return LsmtLayer(self._file)
        except BaseException:
            self.unseal()
            raise

    @abstractmethod
    def unseal(self) -> None:
        """Undo :meth:`seal`: cut off index and trailer, and allow writing again.

        Raises IllegalTransitionError unless the layer is sealed and not retired.
        """

    @abstractmethod
    def retire(self) -> None:
        """After :meth:`seal`: close all but the data file, which the sealed layer closes from now on.

        Raises IllegalTransitionError unless the layer is sealed.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files. The kernel still writes unflushed data, which survives the end of this process."""

    @property
    def virtual_size(self) -> int:
        """Size of the disk in bytes; 0 leaves it to the layers below."""
        return self.header.virtual_size

    @property
    def uuid(self) -> str:
        """The layer's UUID."""
        return self.header.uuid

    @property
    def parent_uuid(self) -> str:
        """UUID of the layer this one was made on."""
        return self.header.parent_uuid

    @property
    def user_tag(self) -> str:
        """The message in the header."""
        return self.header.user_tag.decode(errors="replace")

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Return the disk's bytes as this layer has them: zeros where it holds nothing."""
        pieces = self.read_held(offset, length)
        return b"".join(bytes(size) if data is None else data for size, data in pieces)

    def _undo_seal(self) -> None:
        self._state.check(State.WRITABLE)
        trailer = find_seal(self._file, self.header)
        if trailer is not None:
            self._file.lock()
            undo_seal(self._file, trailer)
        self._state.become(State.WRITABLE)

    def _check_writable(self) -> None:
        if self._state.now is State.CLOSED:
            raise SourceError("layer file is closed", blob=self.name)
        if self._state.now is not State.WRITABLE:
            raise SourceError("layer was sealed or opened for reading only, it cannot be written", blob=self.name)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.header.virtual_size:
            raise OutOfRangeError(
                f"{self.name}: range outside the disk (got [{offset}, {offset + length}), "
                f"wanted inside [0, {self.header.virtual_size}))"
            )

    def _check_growth(self, virtual_size: int) -> None:
        check_virtual_size(virtual_size, self.name)
        if virtual_size < self.virtual_size:
            raise OutOfRangeError(f"{self.name}: a layer cannot shrink (got {virtual_size}, has {self.virtual_size})")

    def _make_room(self, offset: int, length: int) -> None:
        # A write may end past the disk's end; the disk grows before it.
        if offset < 0:
            self._check_range(offset, length)
        if length and offset + length > self.virtual_size:
            self.set_virtual_size(-(-(offset + length) // SECTOR) * SECTOR)


def check_virtual_size(virtual_size: int, name: str = "writable layer") -> None:
    """Raise OutOfRangeError unless a writable layer can have this virtual size."""
    if virtual_size % SECTOR or not 0 <= virtual_size <= MAX_VIRTUAL_SIZE:
        raise OutOfRangeError(
            f"{name}: no virtual size for a writable layer (got {virtual_size}, "
            f"wanted a multiple of {SECTOR} up to {MAX_VIRTUAL_SIZE})"
        )
