"""Hot layers: the data that a start reads, stored again in one small layer on top, in the order of use.

The disk's contents stay the same. Fetching the layer takes a request or two, and its data arrives in the order of the
start's reads. A reader that does not know hot layers reads it like any other layer.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import zstandard

from obdlab.blob import find, range_in
from obdlab.cache.ahead.stream import StreamAhead
from obdlab.cache.cachedblob import CachedBlob
from obdlab.errors import ObdlabError
from obdlab.formats.lsmt.layout import HEADER_SPACE, SECTOR
from obdlab.formats.trace import Trace
from obdlab.formats.zfile import Algorithm
from obdlab.formats.zfile.layout import HEADER_SIZE, ZFileHeader, is_zfile
from obdlab.layers.commit import commit
from obdlab.layers.ends import guessed_end
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.tarwrap import open_tarwrap
from obdlab.traces.replay import reads_in
from obdlab.traces.sectors import sectors_of_reads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob
    from obdlab.layers.commit import Committed
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.ordering import SectorRange
    from obdlab.layers.sink import Sink
    from obdlab.layers.stack import Stack

logger = logging.getLogger(__name__)

#: The layer's commit message, which marks it as hot.
TAG = "obdlab: hot layer"
# A larger layer is not worth fetching whole before a start.
_LARGEST = 1 << 30
# Bounds the window of a zstd frame whose beginning is read; blocks are smaller.
_WINDOW = 1 << 20


# Gaps between two reads, up to this size, are in the layer as well. When threads run in another order, the kernel
# reads around other places: without the gaps, four of eight starts of a JVM read 48 KiB that the recorded one had
# not. They cost 5 % of the layer's bytes. Half the size does not cover those reads, twice the size costs 10 %.
_GAP_SECTORS = (64 << 10) // SECTOR


class NothingHotError(ObdlabError, code="nothing-hot"):
    """A trace names no data of the image."""


def write_hot_layer(disk: Stack, trace: bytes, sink: Sink, *, name: str = "trace") -> Committed:
    """Write to ``sink`` an LSMT layer of the data that the trace or priority list names, small gaps included.

    Raises FormatError or CorruptBlobError for a trace that is damaged or of another image, NothingHotError if it
    names no data of the disk, and the errors of reading the disk.
    """
    sectors = sectors_of_reads(reads_in(trace, disk, name=name), disk)
    if not sectors:
        raise NothingHotError(f"{name}: names nothing of this image")
    top = disk.layers[-1]
    parent_uuid = top.uuid if isinstance(top, LsmtLayer) else ""
    # The gaps come last in the file: a start that reads like the recorded one waits for none of them.
    first = [*sectors, *_gaps(sectors)]
    return commit(disk, sink, parent_uuid=parent_uuid, user_tag=TAG, first=first, only_first=True)


def _gaps(sectors: Sequence[SectorRange]) -> Iterator[SectorRange]:
    stop = 0
    for begin, end in sorted(sectors):
        if stop and 0 < begin - stop <= _GAP_SECTORS:
            yield stop, begin
        stop = max(stop, end)


def is_hot(layer: Layer) -> bool:
    """Return True if :func:`write_hot_layer` made the layer."""
    return isinstance(layer, LsmtLayer) and layer.user_tag == TAG


def trace_of_hot_layer(disk: Stack) -> Trace | None:
    """Return the trace that the disk's hot layer stands for, in its order; None if it has no hot layer."""
    if not disk.layers or not is_hot(disk.layers[-1]):
        return None
    segments = disk.layers[-1].index.segments()
    rows = sorted((moffset, length) for _, length, moffset, _, _ in segments[~segments.zeroed].rows())
    top = len(disk.layers) - 1
    return Trace.from_reads((top, moffset * SECTOR, length * SECTOR) for moffset, length in rows)


def stream_if_hot(layer: LsmtLayer) -> StreamAhead | None:
    """Begin to fetch a whole layer if it is hot and in a registry; return its stream, else None."""
    cached = find(layer.data, CachedBlob) if is_hot(layer) else None
    return None if cached is None else _stream(cached)


def stream_whole(blob: Blob) -> StreamAhead | None:
    """Like :func:`stream_if_hot`, for a layer that its configuration calls hot, before any of it is fetched."""
    cached = find(blob, CachedBlob)
    return None if cached is None else _stream(cached)


def stream_if_begins_hot(blob: Blob, beginning: int) -> StreamAhead | None:
    """Like :func:`stream_if_hot`, but decided by :func:`begins_hot`: a round trip earlier."""
    cached = find(blob, CachedBlob)
    return _stream(cached) if cached is not None and begins_hot(blob, beginning) else None


def begins_hot(blob: Blob, beginning: int) -> bool:
    """Return True if the first ``beginning`` bytes, unchecked, look like a hot layer's.

    That suffices for fetching ahead: if it is wrong, only bytes of this blob were fetched in vain.
    """
    try:
        return TAG.encode() in _first_bytes(blob, beginning)
    except (ObdlabError, zstandard.ZstdError):  # opening the layer reports the damage
        return False


# Returns the layer's header, or its compressed form if that contains the same text.
def _first_bytes(blob: Blob, beginning: int) -> bytes:
    content = open_tarwrap(blob)
    start, _ = range_in(blob, content, 0, 0)
    data = content.read_at(0, min(beginning - start, content.size))
    if not is_zfile(data):
        return data[:HEADER_SPACE]
    header = ZFileHeader.from_bytes(data, blob=blob.name)
    data = data[HEADER_SIZE + header.dict_size :]
    if header.algorithm == Algorithm.ZSTD:
        # Only the index has the block's length. The stream reader unpacks no more than asked for.
        return zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(data).read(HEADER_SPACE)
    return data[:HEADER_SPACE]  # LZ4 stores the first occurrence of a text literally


def _stream(blob: CachedBlob) -> StreamAhead | None:
    if blob.size > _LARGEST:
        logger.warning("%s: not fetched ahead (got %d bytes, wanted at most %d)", blob.name, blob.size, _LARGEST)
        return None
    stream = StreamAhead(blob.name, blob, left=guessed_end(blob.size))
    stream.start()
    return stream
