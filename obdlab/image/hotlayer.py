"""Hot layers: what a start reads, once more, as one small layer on top, laid out in the order of use.

Read from there the disk is the same. Fetching the layer is a request or two, and what they bring comes in time for
its readers; whoever does not know it for what it is reads it like any other layer.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import zstandard

from obdlab.errors import ObdlabError
from obdlab.formats.lsmt.layout import HEADER_SPACE, SECTOR
from obdlab.formats.trace import Trace
from obdlab.formats.zfile.layout import HEADER_SIZE, Algorithm, ZFileHeader, is_zfile
from obdlab.image.ends import guessed_end
from obdlab.image.replay import cached_blob_of, reads_in
from obdlab.image.tracemap import sectors_of_reads
from obdlab.layers.commit import commit
from obdlab.layers.lsmt import LsmtLayer
from obdlab.layers.tarwrap import WrappedContent, open_tarwrap
from obdlab.sources.streamahead import StreamAhead

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.blob import Blob
    from obdlab.layers.commit import Committed
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.ordering import SectorRange
    from obdlab.layers.sink import Sink
    from obdlab.layers.stack import Stack
    from obdlab.sources.cachedblob import CachedBlob

logger = logging.getLogger(__name__)

#: What the layer's commit message says, by which it is known.
TAG = "obdlab: hot layer"
# One that is larger is nothing to fetch whole before a start.
_LARGEST = 1 << 30
# Of a zstd frame whose beginning is looked at; blocks are smaller.
_WINDOW = 1 << 20


# What lies between two reads, up to so much, is in the layer as well. When threads meet in another order, the kernel
# reads around other places: without this, four of eight starts of a JVM read 48 KiB that the recorded one had not. It
# costs 5 % of the layer's bytes. Gaps of half the size do not cover those reads, of twice the size cost 10 %.
_GAP_SECTORS = (64 << 10) // SECTOR


class NothingHotError(ObdlabError):
    """A trace names nothing that the image has."""


def write_hot_layer(disk: Stack, trace: bytes, sink: Sink, *, name: str = "trace") -> Committed:
    """Write to ``sink`` the LSMT layer of what the trace or priority list names of the disk, small gaps included.

    Raises FormatError or CorruptBlobError for a trace that is damaged or of another image, NothingHotError if nothing
    of it is data of the disk, and what reading the disk raises.
    """
    sectors = sectors_of_reads(reads_in(trace, disk, name=name), disk)
    if not sectors:
        raise NothingHotError(f"{name}: names nothing of this image")
    top = disk.layers[-1]
    parent_uuid = top.uuid if isinstance(top, LsmtLayer) else ""
    # Last in the file: a start that reads as the recorded one does waits for none of it.
    first = [*sectors, *_gaps(sectors)]
    return commit(disk, sink, parent_uuid=parent_uuid, user_tag=TAG, first=first, only_first=True)


def _gaps(sectors: Sequence[SectorRange]) -> Iterator[SectorRange]:
    stop = 0
    for begin, end in sorted(sectors):
        if stop and 0 < begin - stop <= _GAP_SECTORS:
            yield stop, begin
        stop = max(stop, end)


def is_hot(layer: Layer) -> bool:
    """Whether the layer was made by :func:`write_hot_layer`."""
    return isinstance(layer, LsmtLayer) and layer.user_tag == TAG


def trace_of_hot_layer(disk: Stack) -> Trace | None:
    """Return what fetching the disk's hot layer ahead amounts to, in that order; None if it has none."""
    if not disk.layers or not is_hot(disk.layers[-1]):
        return None
    segments = disk.layers[-1].index.segments()
    rows = sorted((moffset, length) for _, length, moffset, _, _ in segments[~segments.zeroed].rows())
    top = len(disk.layers) - 1
    return Trace.from_reads((top, moffset * SECTOR, length * SECTOR) for moffset, length in rows)


def stream_if_hot(layer: LsmtLayer) -> StreamAhead | None:
    """If it is a hot layer in a registry, begin to fetch all of it; return what does."""
    blob = cached_blob_of(layer.data) if is_hot(layer) else None
    return None if blob is None else _stream(blob)


def stream_whole(blob: Blob) -> StreamAhead | None:
    """As :func:`stream_if_hot`, for a layer that its configuration calls hot, before anything of it is there."""
    cached = cached_blob_of(blob)
    return None if cached is None else _stream(cached)


def stream_if_begins_hot(blob: Blob, beginning: int) -> StreamAhead | None:
    """As :func:`stream_if_hot`, by :func:`begins_hot`: a round trip earlier."""
    cached = cached_blob_of(blob)
    return _stream(cached) if cached is not None and begins_hot(cached, beginning) else None


def begins_hot(blob: Blob, beginning: int) -> bool:
    """Whether the first ``beginning`` bytes look like a hot layer's, of which nothing is checked.

    Good for fetching it ahead: whatever it turns out to be, no more than its bytes have been fetched.
    """
    try:
        return TAG.encode() in _first_bytes(blob, beginning)
    except (ObdlabError, zstandard.ZstdError):  # opening the layer says what is wrong with it
        return False


# The layer's header, or what it is packed into where that has the same text in it.
def _first_bytes(blob: Blob, beginning: int) -> bytes:
    content = open_tarwrap(blob)
    start = content.window.offset if isinstance(content, WrappedContent) else 0
    data = content.read_at(0, min(beginning - start, content.size))
    if not is_zfile(data):
        return data[:HEADER_SPACE]
    header = ZFileHeader.from_bytes(data, blob=blob.name)
    data = data[HEADER_SIZE + header.dict_size :]
    if header.algorithm == Algorithm.ZSTD:
        # How long the block is, only the index tells; no more than is asked for is unpacked.
        return zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(data).read(HEADER_SPACE)
    return data[:HEADER_SPACE]  # LZ4 leaves a text that is there for the first time as it is


def _stream(blob: CachedBlob) -> StreamAhead | None:
    if blob.size > _LARGEST:
        logger.warning("%s: not fetched ahead (got %d bytes, wanted at most %d)", blob.name, blob.size, _LARGEST)
        return None
    stream = StreamAhead(blob.name, blob, left=guessed_end(blob.size))
    stream.start()
    return stream
