"""From a trace, reads of layers' files, to the sectors of the disk that were read."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from obdlab.formats.lsmt.layout import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from obdlab.layers.lsmt import Layer
    from obdlab.layers.ordering import SectorRange
    from obdlab.layers.stack import Stack


class _Placed:
    # The places of a layer's data on the disk, sorted by place in the file.
    def __init__(self, layer: Layer) -> None:
        segments = layer.index.segments()
        data = segments[~segments.zeroed]
        rows = sorted((moffset, length, offset) for offset, length, moffset, _, _ in data.rows())
        self._rows = rows
        self._ends = [moffset + length for moffset, length, _ in rows]

    def on_disk(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first sector on the disk, its sector in the file, count) of the data in a range of the file."""
        number = bisect_left(self._ends, begin + 1)
        while number < len(self._rows) and self._rows[number][0] < end:
            moffset, length, offset = self._rows[number]
            first, stop = max(begin, moffset), min(end, moffset + length)
            yield offset + first - moffset, first, stop - first
            number += 1


def sectors_of_reads(reads: Iterable[tuple[int, int, int]], disk: Stack) -> list[SectorRange]:
    """Return the disk's sectors ``[begin, end)`` that the reads (layer, offset, length) were for, in their order.

    Headers, indexes and data hidden by a layer above are left out. The reads must lie inside of the layers
    (:meth:`obdlab.formats.trace.Trace.check_fits`).
    """
    placed: dict[int, _Placed] = {}
    top = len(disk.layers) - 1
    found: list[SectorRange] = []
    for layer, offset, length in reads:
        if layer not in placed:
            placed[layer] = _Placed(disk.layers[layer])
        for sector, at, count in placed[layer].on_disk(offset // SECTOR, -(-(offset + length) // SECTOR)):
            for begin, size, tag, moffset in disk.index.lookup(sector, sector + count):
                if top - tag == layer and tag >= 0 and moffset - begin == at - sector:
                    _append(found, begin, begin + size)
    return found


def _append(found: list[SectorRange], begin: int, end: int) -> None:
    if found and found[-1][1] == begin:
        found[-1] = (found[-1][0], end)
    else:
        found.append((begin, end))
