"""Commit: a writable layer, or a whole stack flattened, as one compact sealed layer file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from obdlab.formats.lsmt.index import coalesce, split
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    INDEX_PADDING_RECORDS,
    SECTOR,
    Flags,
    Header,
    Segments,
    Trailer,
    encode_segments,
    encode_user_tag,
    filler_records,
)
from obdlab.layers.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.sink import Sink

# The original copies in chunks of this and makes a record of each. Joining them again gives longer segments, but
# where those end depends on it.
_COPY_SECTORS = 32 * 1024 // SECTOR
_READ_SECTORS = 1024 * 1024 // SECTOR


@dataclass(frozen=True, slots=True)
class Committed:
    """What was written: bytes of the whole file, index records without padding, and sectors of data."""

    size: int
    records: int
    data_sectors: int


def commit(
    source: Layer | Stack,
    sink: Sink,
    *,
    uuid: str | None = None,
    parent_uuid: str | None = None,
    user_tag: str = "",
    virtual_size: int | None = None,
) -> Committed:
    """Write ``source`` to ``sink`` as a sealed LSMT layer: header, packed data, index, trailer, strictly in order.

    A single layer keeps what it hides of layers below; a stack is flattened. ``uuid`` defaults to all zeros,
    ``parent_uuid`` to that of the layer, or of the stack's bottom layer, ``virtual_size`` to the source's. The
    bytes are those of the original's commit of the same segments (overlaybd LSMT layout, commit procedure).

    Raises ValueError, before anything is written, if a UUID, the tag or the size does not fit; and what the source
    or the sink raises. The source must not change meanwhile. Nothing is synced.
    """
    info = {
        "virtual_size": _virtual_size(source) if virtual_size is None else virtual_size,
        "uuid": uuid or "",
        "parent_uuid": source.parent_uuid if parent_uuid is None else parent_uuid,
        "user_tag": encode_user_tag(user_tag),
    }
    header = Header(flags=Flags.HEADER | Flags.DATA | Flags.SEALED, **info)  # type: ignore[arg-type]
    sink.write(header.to_bytes())

    segments = source.index.segments()
    for piece in _copied_data(segments, source.blobs if isinstance(source, Stack) else (source.data,)):
        sink.write(piece)
    packed = _packed(segments)
    data_sectors = int(packed.mapped_sectors.sum())

    records = encode_segments(packed)
    padding = -len(packed) % INDEX_PADDING_RECORDS
    index = records + filler_records(padding)
    if index:
        sink.write(index)
    trailer = Trailer(
        flags=Flags.DATA | Flags.SEALED,
        index_offset=HEADER_SPACE + data_sectors * SECTOR,
        index_size=len(packed) + padding,
        **info,  # type: ignore[arg-type]
    )
    sink.write(trailer.to_bytes())
    return Committed(
        size=trailer.index_offset + len(index) + HEADER_SPACE, records=len(packed), data_sectors=data_sectors
    )


def _virtual_size(source: Layer | Stack) -> int:
    return source.size if isinstance(source, Stack) else source.virtual_size


def _packed(segments: Segments) -> Segments:
    # The index of the output: data follows the header without gaps, zeroed segments point at where they come.
    pieces = split(segments, _COPY_SECTORS, split_zeroed=False)
    mapped = pieces.mapped_sectors
    return coalesce(
        Segments(
            offset_sectors=pieces.offset_sectors,
            length_sectors=pieces.length_sectors,
            moffset_sectors=HEADER_SPACE // SECTOR + np.cumsum(mapped) - mapped,
            zeroed=pieces.zeroed,
            tag=pieces.tag,
        )
    )


def _copied_data(segments: Segments, blobs: Sequence[Blob]) -> Iterator[bytes]:
    # The data of all segments in disk order, in pieces of about 1 MiB. Segments that continue each other in their
    # file are read at once.
    data = segments[~segments.zeroed]
    if not len(data):
        return
    begin, length = data.moffset_sectors, data.length_sectors
    continues = (begin[1:] == (begin + length)[:-1]) & (data.tag[1:] == data.tag[:-1])
    heads = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~continues)))
    totals = np.add.reduceat(length, heads)
    pending: list[bytes] = []
    pending_sectors = 0
    for tag, at, total in zip(data.tag[heads].tolist(), begin[heads].tolist(), totals.tolist(), strict=True):
        end = at + total
        while at < end:
            count = min(end - at, _READ_SECTORS - pending_sectors)
            pending.append(blobs[tag].read_at(at * SECTOR, count * SECTOR))
            pending_sectors += count
            at += count
            if pending_sectors == _READ_SECTORS:
                yield b"".join(pending)
                pending, pending_sectors = [], 0
    if pending:
        yield b"".join(pending)
