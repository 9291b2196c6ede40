"""Layers made on the spot, and wrappers that watch what is read."""

from __future__ import annotations

import io

import numpy as np

from obdlab.blob import Blob, MemoryBlob
from obdlab.call import Call
from obdlab.formats.lsmt.layout import Flags, Header, Segments, Trailer, encode_segments
from obdlab.layers.lsmt import LsmtLayer

# offset, length, zeroed; sectors
Extent = tuple[int, int, bool]


def sealed_bytes(rows: list[tuple[int, int, int, bool, int]], data: bytes, virtual_size: int) -> bytes:
    """A sealed layer file with these records and this data, whether or not they fit each other."""
    header = Header(flags=Flags.HEADER | Flags.DATA | Flags.SEALED, virtual_size=virtual_size)
    trailer = Trailer(
        flags=Flags.DATA | Flags.SEALED,
        virtual_size=virtual_size,
        index_offset=4096 + len(data),
        index_size=len(rows),
    )
    return header.to_bytes() + data + encode_segments(Segments.from_rows(rows)) + trailer.to_bytes()


def layer(extents: list[Extent], virtual_size: int, seed: int = 0, name: str = "layer") -> LsmtLayer:
    """A sealed layer holding these extents, filled with random bytes of the seed."""
    rows = []
    out = io.BytesIO()
    rng = np.random.default_rng(seed)
    for offset, length, zeroed in extents:
        rows.append((offset, length, 8 + out.tell() // 512, zeroed, 0))
        if not zeroed:
            out.write(rng.bytes(length * 512))
    return LsmtLayer(MemoryBlob(sealed_bytes(rows, out.getvalue(), virtual_size), name))


class Watched(Blob):
    """Passes everything on, and remembers the calls."""

    def __init__(self, blob: Blob) -> None:
        self.name = blob.name
        self.blob = blob
        self.reads: list[tuple[int, int]] = []
        self.evicted: list[tuple[int, int]] = []
        self.closed = False

    @property
    def size(self) -> int:
        return self.blob.size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.reads.append((offset, length))
        return self.blob.read_at(offset, length)

    def evict(self, offset: int, length: int) -> None:
        self.evicted.append((offset, length))

    def close(self) -> None:
        self.closed = True
