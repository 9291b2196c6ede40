"""The ZFile format: seekable compression in independent blocks."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Algorithm(IntEnum):
    """How blocks are compressed. (0, mini-LZO, was reserved and never implemented.)"""

    LZ4 = 1
    ZSTD = 2

    @property
    def label(self) -> str:
        """The name in options and settings."""
        return self.name.lower()


#: Algorithms by their names in options and settings.
ALGORITHMS = {each.label: each for each in Algorithm}

#: Default compression of commands, conversions and experiments. On a slow link bytes count more than processor time:
#: an image of Python and its science packages takes 96 MB with it, and 145 MB with the original's lz4 and 4 KiB. The
#: original reads both.
DEFAULT_ALGORITHM: Final = Algorithm.ZSTD.label
DEFAULT_BLOCK_SIZE: Final = 16 << 10
