"""A bound on the memory of one image's tables, for any number of layers and any content.

A layer's index and block table compress well: a blob of less than 1 MiB can hold a million records, and an image can
list 255 layers. So a layer takes its share of the image's budget before it reads a table.
"""

from __future__ import annotations

import threading

from obdlab.errors import FormatError

#: Bytes for the tables of all layers of an image, merged index included: 4 million segments, or blocks of 128 GiB (at
#: 4 KiB). Reading and merging them takes up to four times as much for a while.
TABLES = 256 << 20
#: Bytes of a segment in its layer's index and in the merged one; bytes of a block of a ZFile.
SEGMENT, BLOCK = 64, 8
#: Segments that fit into TABLES.
MOST_SEGMENTS = TABLES // SEGMENT


class TablesTooLargeError(FormatError, code="tables-too-large"):
    """The tables of an image's layers take too much memory together. Each of its blobs may be as it must be."""


class Budget:
    """The memory left for the layers of one image. Thread-safe."""

    def __init__(self, limit: int = TABLES) -> None:
        self._limit = limit
        self._taken = 0
        self._lock = threading.Lock()

    def share(self) -> Share:
        """Return the share of one layer, which is empty at first."""
        return Share(self)

    def move(self, before: int, after: int, blob: str) -> None:
        """Resize a part from ``before`` to ``after`` bytes. Raises TablesTooLargeError naming ``blob``."""
        with self._lock:
            taken = self._taken - before + after
            if taken > self._limit:
                raise TablesTooLargeError(
                    "tables of an image's layers take too much memory",
                    blob=blob,
                    got=f"{taken} bytes with this one",
                    wanted=f"at most {self._limit}",
                )
            self._taken = taken


class Share:
    """One layer's part of a budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._segments = self._blocks = 0

    def take_segments(self, count: int, blob: str) -> None:
        """Take memory for the segments, before the index is read. Raises TablesTooLargeError."""
        self._budget.move(self._segments * SEGMENT, count * SEGMENT, blob)
        self._segments = count

    def take_blocks(self, count: int, blob: str) -> None:
        """Take memory for the file's blocks, before its table is read. Raises TablesTooLargeError."""
        self._budget.move(self._blocks * BLOCK, count * BLOCK, blob)
        self._blocks = count
