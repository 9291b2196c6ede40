"""What opening a remote layer needs besides its beginning, fetched in two rounds of requests at most.

The first round is the blob's beginning and as much of its end as is likely to hold the compression's index and the
layer's trailer. The second is what is missing then, in one request: the layer's index, whose place the trailer tells;
or, if the guess was too short for that, all that lies before it and may be needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.formats.lsmt.layout import HEADER_SPACE
from obdlab.formats.zfile.layout import CRC_SIZE, HEADER_SIZE, is_zfile
from obdlab.layers.tarwrap import WrappedContent, open_tarwrap
from obdlab.layers.zfile_reader import read_description

if TYPE_CHECKING:
    from obdlab.blob import Blob

# 4 bytes for each compressed block of 4 KiB come to a 450th to a 750th of the blob; the trailer, the tar's end and a
# small index fit into the rest. A wrong guess costs another request, or a few KiB.
_END_SHARE = 448
_END_LEAST = 16 << 10
# A layer's index of 16 bytes per segment, compressed, is rarely larger.
_MOST_INDEX = 256 << 10


def guessed_end(size: int) -> int:
    """Return how much of the end of a blob of ``size`` bytes is fetched in the first round."""
    return min(size, size // _END_SHARE + _END_LEAST)


def fetch_rest_of_end(blob: Blob) -> None:
    """Read what the guess left out, so that a cache below has it. An error comes up when the layer is opened."""
    known = blob.size - guessed_end(blob.size)
    try:
        content = open_tarwrap(blob)
        if not is_zfile(content.read_at(0, min(HEADER_SIZE, content.size))):
            return
        header = read_description(content)
    except ObdlabError:
        return
    # Where the blocks end in which the layer's trailer lies, the last thing that is read at the end.
    start = content.window.offset if isinstance(content, WrappedContent) else 0
    blocks_end = start + header.index_offset
    blocks = -(-2 * HEADER_SPACE // header.block_size) + 1
    needed = blocks_end - blocks * (header.block_size + CRC_SIZE)
    if 0 < needed < known <= blob.size:
        begin = max(0, needed - _MOST_INDEX)
        try:
            blob.read_at(begin, known - begin)
        except ObdlabError:
            return
