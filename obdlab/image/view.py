"""A disk to look into: the layer of each range, as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from obdlab.blob import check_range
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.frames import pandas_or_error
from obdlab.layers.stack import Stack

if TYPE_CHECKING:
    import pandas as pd

    from obdlab.formats.lsmt.layout import Segments


@dataclass(frozen=True, slots=True)
class Owned:
    """The bytes ``[begin, end)`` of a disk, and the number of the layer they come from, 0 being the bottom.

    ``layer`` is None for a hole. A ``zeroed`` range is stored as zeros, without data.
    """

    begin: int
    end: int
    layer: int | None
    zeroed: bool = False


class Disk(Stack):
    """A stack of layers for interactive use, for example in a notebook.

    ``len(disk)`` and ``disk[a:b]`` are in bytes, ``disk.layers`` are the layers from the bottom up.
    """

    def owners(self, begin: int = 0, end: int | None = None) -> list[Owned]:
        """Return the layer of each part of the bytes ``[begin, end)``, in order and without gaps; by default of all.

        Raises OutOfRangeError if the range is not inside the disk.
        """
        end = self.size if end is None else end
        check_range(self, begin, end - begin)
        segments, top = self.index.segments(), len(self.layers) - 1
        inside = (segments.offset_sectors * SECTOR < end) & (segments.end_sectors * SECTOR > begin)
        owned: list[Owned] = []
        at = begin
        for first, length, _, zeroed, tag in segments[inside].rows():
            start, stop = max(begin, first * SECTOR), min(end, (first + length) * SECTOR)
            if at < start:
                owned.append(Owned(at, start, None))
            owned.append(Owned(start, stop, top - tag, bool(zeroed)))
            at = stop
        if at < end:
            owned.append(Owned(at, end, None))
        return owned

    def index_frame(self) -> pd.DataFrame:
        """Return the merged index as a table: one row per segment, without the holes.

        Columns: ``begin``, ``end``, ``size`` (bytes of the disk), ``layer`` (0 is the bottom), ``name``, ``zeroed``,
        ``file_offset`` (bytes in the layer's uncompressed file; -1 if zeroed). Needs the lab extra (LabExtraError).
        """
        segments = self.index.segments()
        frame = segment_frame(segments)
        layer = len(self.layers) - 1 - segments.tag.astype(np.int64)
        names = np.array([layer.name for layer in self.layers], dtype=object)
        frame.insert(3, "layer", layer)
        frame.insert(4, "name", names[layer])
        return frame

    def layer_frame(self) -> pd.DataFrame:
        """Return the layers as a table, bottom first. Needs the lab extra (LabExtraError).

        Columns: ``name``, ``segments``, ``held`` (bytes of data in the layer), ``zeroed`` (bytes it holds as zeros),
        ``visible`` (bytes of its data that no layer above hides).
        """
        pandas = pandas_or_error()
        merged, top = self.index.segments(), len(self.layers) - 1
        rows = []
        for number, layer in enumerate(self.layers):
            own = layer.index.segments()
            visible = merged.length_sectors[(merged.tag == top - number) & ~merged.zeroed]
            rows.append(
                {
                    "name": layer.name,
                    "segments": len(own),
                    "held": int(own.length_sectors[~own.zeroed].sum()) * SECTOR,
                    "zeroed": int(own.length_sectors[own.zeroed].sum()) * SECTOR,
                    "visible": int(visible.sum()) * SECTOR,
                }
            )
        return cast("pd.DataFrame", pandas.DataFrame(rows))


def segment_frame(segments: Segments) -> pd.DataFrame:
    """Return the index of one layer as a table, with those columns of :meth:`Disk.index_frame` that apply to it."""
    begin, length = segments.offset_sectors * SECTOR, segments.length_sectors * SECTOR
    frame: pd.DataFrame = pandas_or_error().DataFrame(
        {
            "begin": begin,
            "end": begin + length,
            "size": length,
            "zeroed": segments.zeroed,
            "file_offset": np.where(segments.zeroed, -1, segments.moffset_sectors * SECTOR),
        }
    )
    return frame
