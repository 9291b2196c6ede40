"""Commit: a writable layer, or a whole stack flattened, as one compact sealed layer file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import FormatError
from obdlab.formats.lsmt.index import coalesce, overlay, split
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    INDEX_PADDING_RECORDS,
    MAX_SEALED_RECORDS,
    MAX_SEGMENT_SECTORS,
    SECTOR,
    Flags,
    Header,
    Segments,
    Trailer,
    encode_segments,
    encode_user_tag,
    filler_records,
)
from obdlab.formats.lsmt.warp import REMOTE
from obdlab.layers.ordering import all_data_first, data_first, in_disk_order
from obdlab.layers.stack import Stack, WritableStack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.ordering import SectorRange
    from obdlab.layers.sink import Sink

# The original copies in chunks of this size and makes a record of each. Joining gives longer segments, but the place
# where they end depends on the chunks.
_COPY_SECTORS = 32 * 1024 // SECTOR
_READ_SECTORS = 512 * 1024 // SECTOR
_BATCH_PIECES = 1 << 18
_BLOCK_SECTORS = 4096 // SECTOR


@dataclass(frozen=True, slots=True)
class Committed:
    """Sizes of a commit's output: bytes of the file, index records without padding, sectors of data."""

    size: int
    records: int
    data_sectors: int


class ZeroBlocks(Enum):
    """How a commit treats whole 4 KiB blocks of data that are all zero."""

    #: Store them, as the original does.
    KEEP = "keep"
    #: Write zeroed records: they take no space, and still hide the layers below.
    MARK = "mark"
    #: Leave them out: they read as zeros only if no layer lies below.
    DROP = "drop"


def commit(
    source: Layer | Stack | WritableStack,
    sink: Sink,
    *,
    uuid: str | None = None,
    parent_uuid: str | None = None,
    user_tag: str = "",
    virtual_size: int | None = None,
    zero_blocks: ZeroBlocks = ZeroBlocks.KEEP,
    first: Sequence[SectorRange] = (),
    only_first: bool = False,
    remote: Segments | None = None,
) -> Committed:
    """Write ``source`` to ``sink`` as a sealed LSMT layer: header, packed data, index, trailer, strictly in order.

    A single layer keeps hiding the same sectors of layers below; a stack is flattened, with its writable layer if it
    has one. ``uuid`` defaults to all zeros, ``parent_uuid`` to that of the layer, or of the stack's bottom layer,
    ``virtual_size`` to the source's. The bytes are those of the original's commit of the same segments (overlaybd
    LSMT layout, commit procedure).

    The data of the disk's sectors ``first`` comes first in the file, in that order, then the rest in disk order. With
    ``only_first`` the rest and all zeroed segments are left out: laid over the source, the layer changes nothing.

    With ``remote``, also of length 0, the layer is a warp layer: these records of its target, in disk order and none
    over the source's, stand among the source's in the index, which is not padded then.

    Before anything is written it raises ValueError if a UUID, the tag or the size does not fit, and FormatError if
    there are more records than a sealed layer may have. Errors of the source and the sink pass through. The source
    must not change meanwhile. Nothing is synced. Memory does not depend on the size of the data.
    """
    if isinstance(source, WritableStack):
        source = source.as_layers()
    info = {
        "virtual_size": _virtual_size(source) if virtual_size is None else virtual_size,
        "uuid": uuid or "",
        "parent_uuid": source.parent_uuid if parent_uuid is None else parent_uuid,
        "user_tag": encode_user_tag(user_tag),
    }
    header = Header(flags=Flags.HEADER | Flags.DATA | Flags.SEALED, **info)  # type: ignore[arg-type]
    blobs = source.blobs if isinstance(source, Stack) else (source.data,)
    segments = source.index.segments()
    if zero_blocks is not ZeroBlocks.KEEP:
        segments = _without_zero_blocks(segments, blobs, mark=zero_blocks is ZeroBlocks.MARK)
    if only_first:
        segments = data_first(segments, first)
    elif first:
        segments = all_data_first(segments, first)
    packed = _packed(segments)
    if first:
        packed = in_disk_order(packed)
    data_sectors = int(packed.mapped_sectors.sum())
    if remote is not None:
        packed = _with_remote(packed, remote)
    padding = -len(packed) % INDEX_PADDING_RECORDS if remote is None else 0
    if len(packed) + padding > MAX_SEALED_RECORDS:
        raise FormatError(
            "too many segments for one layer",
            blob=source.name,
            got=len(packed),
            wanted=f"at most {MAX_SEALED_RECORDS}",
        )

    sink.write(header.to_bytes())
    for piece in _copied_data(segments, blobs):
        sink.write(piece)

    records = encode_segments(packed)
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


def _with_remote(packed: Segments, remote: Segments) -> Segments:
    pieces = split(replace(remote, tag=np.full_like(remote.tag, REMOTE)), MAX_SEGMENT_SECTORS)
    both = Segments.concatenate([packed, pieces])
    both = both[np.argsort(both.offset_sectors, kind="stable")]
    if (both.offset_sectors[1:] < both.end_sectors[:-1]).any():
        raise ValueError("remote records overlap others of the layer, or each other")
    return both


def _virtual_size(source: Layer | Stack) -> int:
    return source.size if isinstance(source, Stack) else source.virtual_size


def _packed(segments: Segments) -> Segments:
    # The index of the output: data follows the header without gaps, a zeroed segment points at the position it comes
    # at. In batches, since there is a piece for every 32 KiB of data: the last segment may still grow and is carried
    # into the next batch.
    parts: list[Segments] = []
    carried = Segments.from_rows([])
    position = HEADER_SPACE // SECTOR
    pieces_before = np.cumsum(-(-segments.length_sectors // _COPY_SECTORS))
    begin = 0
    while begin < len(segments):
        limit = _BATCH_PIECES + (int(pieces_before[begin - 1]) if begin else 0)
        end = max(begin + 1, int(np.searchsorted(pieces_before, limit, side="right")))
        pieces = split(segments[begin:end], _COPY_SECTORS, split_zeroed=False)
        after = position + np.cumsum(pieces.mapped_sectors)
        moved = replace(pieces, moffset_sectors=after - pieces.mapped_sectors)
        joined = coalesce(Segments.concatenate([carried, moved]))
        parts.append(joined[:-1])
        carried = joined[-1:]
        position = int(after[-1])
        begin = end
    return Segments.concatenate([*parts, carried])


def _without_zero_blocks(segments: Segments, blobs: Sequence[Blob], *, mark: bool) -> Segments:
    # Reads all data once before the copying, so that the index is known before the first byte is written.
    ranges: list[tuple[int, int]] = []
    data = segments[~segments.zeroed]
    for offset, length, moffset, _, tag in data.rows():
        begin, end = (
            -(-offset // _BLOCK_SECTORS) * _BLOCK_SECTORS,
            (offset + length) // _BLOCK_SECTORS * _BLOCK_SECTORS,
        )
        for at in range(begin, end, _READ_SECTORS):
            stop = min(end, at + _READ_SECTORS)
            content = blobs[tag].read_at((moffset + at - offset) * SECTOR, (stop - at) * SECTOR)
            ranges += ((at + first, at + last) for first, last in _zero_blocks_in(content))
    if not ranges:
        return segments
    zeros = split(
        Segments.from_rows([(begin, end - begin, 0, True, 0) for begin, end in ranges]), MAX_SEGMENT_SECTORS
    )
    zeros = replace(zeros, moffset_sectors=np.full(len(zeros), -1))
    both = overlay(segments, zeros)
    return both if mark else both[both.moffset_sectors >= 0]


def _zero_blocks_in(content: bytes) -> list[tuple[int, int]]:
    # Returns ranges of sectors, whole blocks each.
    if not content:
        return []
    is_zero = ~np.frombuffer(content, np.uint64).reshape(-1, _BLOCK_SECTORS * SECTOR // 8).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_zero, [False])).astype(np.int8)))
    return [(first, last) for first, last in (edges.reshape(-1, 2) * _BLOCK_SECTORS).tolist()]


def _copied_data(segments: Segments, blobs: Sequence[Blob]) -> Iterator[bytes]:
    # The data of all segments in their order, in pieces that end at every 512 KiB of the output. Batches of a ZFile
    # writer end there too, so it need not join pieces. Segments that continue each other in their file are read
    # together.
    data = segments[~segments.zeroed]
    if not len(data):
        return
    begin, length = data.moffset_sectors, data.length_sectors
    continues = (begin[1:] == (begin + length)[:-1]) & (data.tag[1:] == data.tag[:-1])
    heads = np.flatnonzero(np.concatenate((np.ones(1, np.bool_), ~continues)))
    totals = np.add.reduceat(length, heads)
    pending: list[bytes] = []
    pending_sectors, wanted_sectors = 0, _READ_SECTORS - HEADER_SPACE // SECTOR
    for tag, at, total in zip(data.tag[heads].tolist(), begin[heads].tolist(), totals.tolist(), strict=True):
        end = at + total
        while at < end:
            count = min(end - at, wanted_sectors - pending_sectors)
            pending.append(blobs[tag].read_at(at * SECTOR, count * SECTOR))
            pending_sectors += count
            at += count
            if pending_sectors == wanted_sectors:
                yield _joined(pending)
                pending, pending_sectors, wanted_sectors = [], 0, _READ_SECTORS
    if pending:
        yield _joined(pending)


def _joined(pieces: list[bytes]) -> bytes:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
