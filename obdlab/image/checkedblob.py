"""A layer's blob with a hash tree: every unit is checked before it is returned, from any source.

It stands between the origin and the block cache, so units are checked as they are fetched: by readers, read-ahead,
prefetch, streams of hot layers and the background download. The cache checks the units of its files by the same tree
(:class:`obdlab.cache.units.UnitCheck`).
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from obdlab.blob import Wrapper, check_range
from obdlab.errors import CorruptBlobError, SourceError
from obdlab.formats.hashtree import NODE_SPAN, UNIT
from obdlab.observe.counters import CHECKSUM_FAILURES, CORRUPTIONS_HEALED

if TYPE_CHECKING:
    from obdlab.blob import Blob, ByteStream
    from obdlab.call import Call
    from obdlab.image.treenodes import TreeNodes

logger = logging.getLogger(__name__)


class CheckedBlob(Wrapper):
    """The blob below, its bytes checked by ``nodes``, which this object owns.

    Requests to the blob below are widened to whole units. A wrong unit is logged and counted, :meth:`Blob.evict`
    makes the blob below read past mirrors and proxies, and the range is read once more.
    """

    def __init__(self, below: Blob, nodes: TreeNodes) -> None:
        super().__init__(below)
        self._nodes = nodes
        self._lock = threading.Lock()
        #: Wrong units that were fetched, and not returned.
        self.wrong_units = 0

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Return checked bytes. Raises CorruptBlobError if they are wrong again after fetching them once more."""
        check_range(self, offset, length)
        if not length:
            return b""
        begin, end = self._widened(offset, length)
        self._nodes.request(begin, end)
        data = self._read(begin, end, call)
        wrong = self._nodes.first_wrong(begin, data, call)
        if wrong is not None:
            self.refuse(wrong)
            data = self._read(begin, end, call)
            wrong = self._nodes.first_wrong(begin, data, call)
            if wrong is not None:
                raise self.refuse(wrong)
            CORRUPTIONS_HEALED.add(label="tree")
        return data if len(data) == length else data[offset - begin :][:length]

    def stream(self, offset: int, length: int, call: Call | None = None) -> ByteStream | None:
        """Request a range of whole units by one request; each piece is checked before it is returned.

        The stream is over after a wrong unit: it raises CorruptBlobError, and the next request goes past mirrors.
        """
        check_range(self, offset, length)
        if not length:
            return None
        begin, end = self._widened(offset, length)
        stream = self.below.stream(begin, end - begin, call)
        return None if stream is None else _CheckedStream(self, self._nodes, stream, offset, offset + length, end)

    def refuse(self, offset: int) -> CorruptBlobError:
        """Note a wrong unit, make the blob below read past mirrors, and return the error."""
        error = CorruptBlobError("bytes do not match the hash tree of the manifest", blob=self.name, offset=offset)
        CHECKSUM_FAILURES.add(label="tree")
        with self._lock:
            self.wrong_units += 1
        logger.warning("%s", error)
        self.below.evict(offset, min(UNIT, self.size - offset))
        return error

    def close(self) -> None:
        self._nodes.close()
        super().close()

    def _read(self, begin: int, end: int, call: Call | None) -> bytes:
        data = self.below.read_at(begin, end - begin, call)
        if len(data) != end - begin:
            what = f"short read (got {len(data)} bytes, wanted {end - begin})"
            raise SourceError(what, blob=self.name, offset=begin)
        return data

    def _widened(self, offset: int, length: int) -> tuple[int, int]:
        return offset - offset % UNIT, min(self.size, -(-(offset + length) // UNIT) * UNIT)


class _CheckedStream:
    # The stream below begins and ends at the ends of units; bytes of the last unit may wait in `_rest`.
    def __init__(
        self, blob: CheckedBlob, nodes: TreeNodes, below: ByteStream, position: int, stop: int, units_end: int
    ) -> None:
        self._blob = blob
        self._nodes = nodes
        self._below = below
        self.position = position
        self._stop = stop
        self._units_end = units_end
        self._rest = b""
        self._skipped = position % UNIT
        nodes.request(below.position, min(units_end, below.position + NODE_SPAN))

    def read(self, length: int, call: Call | None = None) -> bytes:
        if length < 0 or length > self._stop - self.position:
            raise ValueError(f"read past the end (got {length}, wanted at most {self._stop - self.position})")
        if len(self._rest) < length:
            self._rest += self._next_units(length - len(self._rest), call)
        data, self._rest = self._rest[:length], self._rest[length:]
        self.position += length
        return data

    def close(self) -> None:
        self._below.close()

    # Returns at least `wanted` checked bytes.
    def _next_units(self, wanted: int, call: Call | None) -> bytes:
        at = self._below.position
        end = min(self._units_end, -(-(at + self._skipped + wanted) // UNIT) * UNIT)
        # Those of the next pieces as well, so that the stream does not wait for them.
        self._nodes.request(at, min(self._units_end, end + NODE_SPAN))
        try:
            data = self._below.read(end - at, call)
            if len(data) != end - at:
                what = f"short read of a stream (got {len(data)} bytes, wanted {end - at})"
                raise SourceError(what, blob=self._blob.name, offset=at)
            wrong = self._nodes.first_wrong(at, data, call)
            if wrong is not None:
                raise self._blob.refuse(wrong)
        except BaseException:
            self.close()
            raise
        skipped, self._skipped = self._skipped, 0
        return data[skipped:]
