"""Records of a warp layer, whose data lies in two files: its own, and the tar of an ordinary layer (turboOCI).

The layer's own file holds the metadata of a file system. The contents of files stay in the tar, the layer's *target*.
The two differ by the tags of their records. A file has no other mark: the image's configuration names the target.
Source: overlaybd LSMT layout, warp files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import FormatError
from obdlab.formats.lsmt.layout import HEADER_SPACE, SECTOR, Segments, check_mapped, check_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Tags of records that map sectors of the layer's own file, and of its target.
LOCAL, REMOTE = 0, 1
_FIRST = HEADER_SPACE // SECTOR


def check_warp_segments(
    segments: Segments, index_offset: int, target_size: int, *, blob: str = "", target: str = ""
) -> Segments:
    """Return a sealed warp layer's records with the tags LOCAL and REMOTE.

    The original subtracts the smallest tag from all, so that a layer with remote records alone would read its own
    file. Here a tag of 1 always means the target; only tags from 2 on are lowered. ``blob`` names the layer's file,
    ``target`` the target of ``target_size`` bytes.

    Raises FormatError unless the records ascend, do not overlap, have two tags at most, and map sectors inside the
    layer's data or the target. A reader that takes a target which is too small gives zeros for its end: so does the
    original for a gzip layer of several members, since its index knows only the first.
    """
    check_order(segments, index_offset, blob=blob)
    remote = _is_remote(segments, index_offset, blob)
    # The other records as ones that are inside anyway, so that an error has the number of its record in the file.
    other = remote | segments.zeroed
    local = replace(segments, zeroed=other, moffset_sectors=np.where(other, _FIRST, segments.moffset_sectors))
    check_mapped(local, index_offset // SECTOR, blob=blob, offset=index_offset)
    end = remote_end(segments[remote])
    if end > target_size:
        raise FormatError(
            f"{blob} needs more bytes than its target has (is it the right one, and whole?)",
            blob=target,
            got=f"{target_size} bytes uncompressed",
            wanted=f"at least {end}",
        )
    return replace(segments, tag=remote.astype(np.uint8))


def remote_end(segments: Segments) -> int:
    """Return the offset after the last byte of the target that the segments, all remote ones, map; 0 without any."""
    mapped = segments[~segments.zeroed]
    return int((mapped.moffset_sectors + mapped.length_sectors).max()) * SECTOR if len(mapped) else 0


def in_one_file(segments: Segments, target_sectors: int) -> Segments:
    """Return the segments of one file, which has the layer's file first and the target from ``target_sectors`` on."""
    moved = (segments.tag == REMOTE) & ~segments.zeroed
    moffset = np.where(moved, segments.moffset_sectors + target_sectors, segments.moffset_sectors)
    return replace(segments, moffset_sectors=moffset).without_tags()


def _is_remote(segments: Segments, index_offset: int, blob: str) -> NDArray[np.bool_]:
    # A zeroed record maps nothing, so its tag does not count.
    tags = segments.tag[~segments.zeroed]
    lowest, highest = (int(tags.min()), int(tags.max())) if len(tags) else (LOCAL, LOCAL)
    base = lowest if highest > REMOTE else LOCAL
    if highest > REMOTE and highest - lowest != 1:
        raise FormatError(
            "tags of a warp layer are ambiguous",
            blob=blob,
            offset=index_offset,
            got=f"tags from {lowest} to {highest}",
            wanted="0 and 1, or two that follow each other",
        )
    remote: NDArray[np.bool_] = ~segments.zeroed & (segments.tag == base + REMOTE)
    return remote
