"""Fetching the parts of a remote layer that opening it reads, in two rounds of requests at most.

The first round fetches the blob's beginning and as much of its end as is likely to hold the compression's index and
the layer's trailer. The second round is one request for the missing part: the layer's index, whose place is in the
trailer; or, if the guess was too short for that, everything before it that may be needed.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from obdlab.blob import range_in
from obdlab.errors import ObdlabError
from obdlab.formats.lsmt.layout import HEADER_SPACE, RECORD_SIZE, SECTOR, Trailer, check_sealed_trailer
from obdlab.formats.zfile.jumptable import check_bounds
from obdlab.formats.zfile.layout import CRC_SIZE, HEADER_SIZE, is_zfile
from obdlab.layers.tarwrap import open_tarwrap
from obdlab.layers.zfile_reader import open_zfile, read_description

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from obdlab.blob import Blob
    from obdlab.formats.zfile.layout import ZFileHeader

#: The tar's header, the ZFile's, and a first block of up to 32 KiB with the layer's. Half of it is enough for most,
#: but a start without a trace soon needs the rest, with the extent around it (redis: 5 round trips more).
BEGINNING = 32 << 10
# An index of 4 bytes per compressed block of 4 KiB is a 450th to a 750th of the blob; the trailer, the tar's end and
# a small layer index fit into the rest. A wrong guess costs another request, or a few KiB.
_END_SHARE = 448
_END_LEAST = 16 << 10
# A layer's index of 16 bytes per segment is rarely larger when compressed.
_MOST_INDEX = 256 << 10
_TAIL = 2 * HEADER_SPACE
# Sizes and offsets are a registry's and an image's word: opening reads what is further off within its budget.
_MOST_END, _MOST_REST = 16 << 20, 64 << 20


def guessed_end(size: int) -> int:
    """Return the size of the end of a blob of ``size`` bytes that the first round fetches."""
    return min(size, size // _END_SHARE + _END_LEAST, _MOST_END)


def places(blob: Blob, unit: int) -> tuple[int, int]:
    """Return where the beginning that :func:`fetch_ends` reads stops, and where the end begins."""
    beginning = min(blob.size, -(-BEGINNING // unit) * unit)
    return beginning, max(blob.size - guessed_end(blob.size), beginning)


def fetch_ends(blob: Blob, unit: int, threads: Executor | None) -> tuple[int, Future[None] | None]:
    """Read a blob's beginning, and its end in one of the ``threads``, into the cache below, of that ``unit``.

    Without threads the end is there already, and not read. Returns the length of the beginning and the future of the
    end, None if there is no more. Raises as reading does.
    """
    beginning, start = places(blob, unit)
    end: Future[None] | None = None
    if start < blob.size and threads is not None:
        end = threads.submit(_read, blob, start, blob.size - start)
    elif start < blob.size:
        end = Future()
        end.set_result(None)
    blob.read_at(0, beginning)
    return beginning, end


def _read(blob: Blob, offset: int, length: int) -> None:
    blob.read_at(offset, length)


def fetch_rest_of_end(blob: Blob) -> None:
    """Read the part of the end that the guess missed into the cache. Ignores errors: opening raises them."""
    try:
        content = open_tarwrap(blob)
        if not is_zfile(content.read_at(0, min(HEADER_SIZE, content.size))):
            return
        header = read_description(content)
        check_bounds(header, content.size, blob=content.name)
        start, _ = range_in(blob, content, 0, 0)
        known = blob.size - guessed_end(blob.size) - start
        needed = _needed(content, header, known)
        if 0 <= needed < known and known - needed <= _MOST_REST:
            content.read_at(needed, known - needed)
    except ObdlabError:
        return


# Returns the offset in the compressed file of the first byte that opening the layer reads at its end. Only the part
# from `known` on has been read so far.
def _needed(content: Blob, header: ZFileHeader, known: int) -> int:
    if header.index_offset < known:
        blocks = -(-_TAIL // header.block_size) + 1
        return max(0, header.index_offset - blocks * (header.block_size + CRC_SIZE) - _MOST_INDEX)
    layer = open_zfile(content)  # reads its index; not closed, as the blob below belongs to the caller
    tail = max(0, layer.size - _TAIL)
    begin, end = layer.map_range(tail, layer.size)
    trailer_at = layer.size - HEADER_SPACE
    if trailer_at < HEADER_SPACE or layer.map_range(trailer_at, layer.size)[0] < known:
        # An upper bound: at most one record for each sector.
        return max(0, begin - min(_MOST_INDEX, layer.size // SECTOR * RECORD_SIZE))
    trailer = Trailer.from_bytes(layer.read_at(trailer_at, HEADER_SPACE), blob=layer.name, offset=trailer_at)
    check_sealed_trailer(trailer, layer.size, blob=layer.name)
    at, size = trailer.index_offset, trailer.index_size * RECORD_SIZE
    return min(begin, layer.map_range(at, at + size)[0] if size else end)
