"""Verifying disks by reading them whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.blob import find
from obdlab.errors import CorruptBlobError
from obdlab.formats.lsmt.layout import HEADER_SPACE, Header
from obdlab.layerfiles.description import check_zfile_trailer
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.zfile import ZFileReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.layerfiles.writing import Progress
    from obdlab.layers.stack import Stack

_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class VerifiedLayer:
    """A layer that could be read whole.

    ``size`` is in uncompressed bytes. ``checksums`` is True if each of them has one, ``names_parent`` if the layer
    names the one below it as its parent (advisory: no reader insists on it).
    """

    name: str
    size: int
    segments: int
    checksums: bool
    names_parent: bool


def verify_layers(disk: Stack, progress: Progress | None = None) -> Iterator[VerifiedLayer]:
    """Read every layer of an open disk whole, bottom first, and yield each that is sound.

    Checks everything that opening the disk did not: every block, and that headers and trailers agree. Raises
    CorruptBlobError at the first block that does not match its CRC, or header that contradicts its trailer, and
    SourceError if bytes cannot be read.
    """
    below = None
    for layer in disk.layers:
        blob = layer.data
        zfile = find(layer.file if isinstance(layer, LsmtLayer) else blob, ZFileReader)
        if zfile is not None:
            check_zfile_trailer(zfile)
        if isinstance(layer, LsmtLayer):
            _check_header(layer)
        for offset in range(0, blob.size, _STEP):
            length = min(_STEP, blob.size - offset)
            blob.read_at(offset, length)
            if progress is not None:
                progress(length)
        yield VerifiedLayer(
            name=layer.name,
            size=blob.size,
            segments=len(layer.index.segments()),
            checksums=zfile is not None and zfile.header.verify,
            names_parent=below is None or layer.parent_uuid == below,
        )
        below = layer.uuid


def _check_header(layer: LsmtLayer) -> None:
    # Readers use the trailer alone; every writer makes them agree.
    header = Header.from_bytes(layer.data.read_at(0, HEADER_SPACE), blob=layer.name)
    for field in ("virtual_size", "uuid", "parent_uuid", "user_tag"):
        if getattr(header, field) != getattr(layer.trailer, field):
            raise CorruptBlobError(
                f"header of the LSMT layer contradicts its trailer in {field}",
                blob=layer.name,
                offset=0,
                got=getattr(header, field),
                wanted=getattr(layer.trailer, field),
            )


def verification_size(disk: Stack) -> int:
    """Return how many bytes :func:`verify_layers` reads."""
    return sum(layer.data.size for layer in disk.layers)
