"""Numbers of blocks as ranges of sectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from obdlab.formats.lsmt.layout import SECTOR

if TYPE_CHECKING:
    from collections.abc import Collection

    from obdlab.layers.ordering import SectorRange


def sectors_of_blocks(blocks: Collection[int], block_size: int) -> list[SectorRange]:
    """Return the sectors of these blocks in the order of the disk, neighbours joined."""
    numbers = np.unique(np.fromiter(blocks, np.int64, len(blocks)))
    if not len(numbers):
        return []
    per_block = block_size // SECTOR
    heads = np.flatnonzero(np.concatenate(([True], np.diff(numbers) != 1)))
    counts = np.diff(np.append(heads, len(numbers)))
    begins = numbers[heads] * per_block
    return list(zip(begins.tolist(), (begins + counts * per_block).tolist(), strict=True))
