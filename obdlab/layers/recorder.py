"""Recording which range of which layer is read, and when."""

from __future__ import annotations

import struct
from time import monotonic_ns
from typing import TYPE_CHECKING

from obdlab.blob import Wrapper
from obdlab.errors import FormatError

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.call import Call
    from obdlab.layers.stack import ReadAt

# Nanoseconds, layer, offset, length.
_READ = struct.Struct("<qIQQ")
#: A million reads take 28 MB; no start needs more.
MOST_READS = 1 << 20


class Recorder:
    """Records the reads of an image's layers. The first ``most`` are kept; the others only counted, in ``left_out``.

    Failed reads are not recorded. A recorded read costs half a microsecond more.
    """

    def __init__(self, most: int = MOST_READS) -> None:
        self.left_out = 0
        self._noted = bytearray()
        self._most = most * _READ.size

    def around(self, layer: int, read_at: ReadAt) -> ReadAt:
        """Return a recording ``read_at`` for the layer with this number: for :meth:`Stack.watch`."""
        noted, most, pack = self._noted, self._most, _READ.pack

        def read(offset: int, length: int, call: Call | None = None) -> bytes:
            at = monotonic_ns()
            data = read_at(offset, length, call)
            if len(noted) < most:
                noted.extend(pack(at, layer, offset, length))  # one call, so that records of threads do not mix
            else:
                self.left_out += 1
            return data

        return read

    def watched(self, layer: int, blob: Blob) -> Blob:
        """Return ``blob`` with its reads recorded: for opening the layer with this number."""
        return _Watched(blob, self.around(layer, blob.read_at))

    def to_bytes(self) -> bytes:
        """Return the recorded reads, for :func:`reads_of`."""
        return bytes(self._noted)


class _Watched(Wrapper):
    def __init__(self, blob: Blob, read_at: ReadAt) -> None:
        super().__init__(blob)
        self._read = read_at

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        return self._read(offset, length, call)


def reads_of(*noted: bytes) -> list[tuple[int, int, int]]:
    """Return (layer, offset, length) of the reads in recorders of one machine, in the order the reads began."""
    for one in noted:
        if len(one) % _READ.size:
            raise FormatError("noted reads are cut short", got=len(one), wanted=f"a multiple of {_READ.size}")
    reads = sorted((read for one in noted for read in _READ.iter_unpack(one)), key=lambda read: read[0])
    return [(layer, offset, length) for _, layer, offset, length in reads]
