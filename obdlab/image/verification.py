"""Reading whole disks to see that they are sound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.layers.zfile import ZFileReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.image.writing import Progress
    from obdlab.layers.stack import Stack

_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class VerifiedLayer:
    """A layer all of which could be read.

    ``size`` is in uncompressed bytes. ``checksums`` tells whether each had one, ``names_parent`` whether the layer
    names the one below it as its parent (advisory: nobody insists on it).
    """

    name: str
    size: int
    segments: int
    checksums: bool
    names_parent: bool


def verify_layers(disk: Stack, progress: Progress | None = None) -> Iterator[VerifiedLayer]:
    """Read every layer of an open disk whole, bottom first, and tell of each that is sound.

    That headers, trailers and indexes are consistent was checked when the disk was opened. Raises CorruptBlobError
    at the first block that does not match its CRC, SourceError if bytes cannot be had.
    """
    below = None
    for layer in disk.layers:
        blob = layer.data
        for offset in range(0, blob.size, _STEP):
            length = min(_STEP, blob.size - offset)
            blob.read_at(offset, length)
            if progress is not None:
                progress(length)
        yield VerifiedLayer(
            name=layer.name,
            size=blob.size,
            segments=len(layer.index.segments()),
            checksums=isinstance(blob, ZFileReader) and blob.header.verify,
            names_parent=below is None or layer.parent_uuid == below,
        )
        below = getattr(layer, "uuid", None)


def verification_size(disk: Stack) -> int:
    """Return how many bytes :func:`verify_layers` reads."""
    return sum(layer.data.size for layer in disk.layers)
