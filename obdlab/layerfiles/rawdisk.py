"""A raw disk image as a layer: only its blocks that are not all zeros."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import FormatError
from obdlab.formats.lsmt.index import SegmentIndex
from obdlab.formats.lsmt.layout import NULL_UUID, SECTOR, Segments
from obdlab.layers.layerfile import LayerFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from obdlab.layerfiles.writing import Progress

_BLOCK = 4096
_STEP = 1 << 20


class RawDisk:
    """A raw disk image as a layer to commit: every 4 KiB block with a byte other than zero is in it.

    Holes of the file are not read. Raises SourceError if the file cannot be read, FormatError if its size is not a
    whole number of sectors. ``begin`` and ``size`` make a part of the file the disk (default: all of it).
    ``progress`` gets all bytes of the disk.
    """

    uuid = parent_uuid = NULL_UUID

    def __init__(
        self,
        path: str | os.PathLike[str],
        progress: Progress | None = None,
        *,
        begin: int = 0,
        size: int | None = None,
    ) -> None:
        self.data = LayerFile(path, os.O_RDONLY)
        self.name = self.data.name
        try:
            self._begin = begin
            self.virtual_size = self.data.size - begin if size is None else size
            if self.virtual_size % SECTOR:
                raise FormatError(
                    "disk image is no whole number of sectors", blob=self.name, got=f"{self.virtual_size} bytes"
                )
            self.index = SegmentIndex(self._segments(progress))
        except BaseException:
            self.data.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.data.close()

    def _segments(self, progress: Progress | None) -> Segments:
        numbers = [np.zeros(0, np.int64)]
        done = 0
        for begin, end in _steps(self.data, self._begin, self.virtual_size):
            numbers.append(begin // _BLOCK + _used_blocks(self.data.read_at(self._begin + begin, end - begin)))
            if progress is not None:
                progress(end - done)
                done = end
        if progress is not None:
            progress(self.virtual_size - done)
        blocks = np.concatenate(numbers)
        heads = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
        begin_sectors = blocks[heads] * (_BLOCK // SECTOR)
        last = blocks[np.append(heads[1:], len(blocks)) - 1] if len(blocks) else blocks
        end_sectors = np.minimum((last + 1) * (_BLOCK // SECTOR), self.virtual_size // SECTOR)
        return Segments(
            offset_sectors=begin_sectors,
            length_sectors=end_sectors - begin_sectors,
            moffset_sectors=begin_sectors + self._begin // SECTOR,
            zeroed=np.zeros(len(heads), np.bool_),
            tag=np.zeros(len(heads), np.uint8),
        )


def _steps(file: LayerFile, start: int, size: int) -> Iterator[tuple[int, int]]:
    # Yields block-aligned pieces of the disk's data extents, relative to its start; each block once.
    reached = 0
    for first, last in file.data_extents(start, start + size):
        begin, end = first - start, last - start
        at = max(reached, begin - begin % _BLOCK)
        reached = min(-(-end // _BLOCK) * _BLOCK, size)
        for step in range(at, reached, _STEP):
            yield step, min(step + _STEP, reached)


def _used_blocks(data: bytes) -> NDArray[np.int64]:
    # Returns the numbers of the blocks that are not all zeros; the last block may be short.
    words = np.frombuffer(data.ljust(-(-len(data) // _BLOCK) * _BLOCK, b"\0"), dtype=np.uint64)
    return np.flatnonzero(words.reshape(-1, _BLOCK // 8).any(axis=1))
