"""CRC-32C as overlaybd uses it: without inversion at either end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import crc32c

if TYPE_CHECKING:
    from obdlab.blob import Buffer

_ALL_ONES = 0xFFFFFFFF


def raw_crc32c(data: Buffer, seed: int = 0) -> int:
    """Return the Castagnoli CRC of ``data`` whose state starts at ``seed`` and is not inverted at the end.

    Headers, indexes and traces use seed 0; ZFile blocks use 100007 (overlaybd ZFile format). The standard CRC-32C
    inverts the state twice; both inversions are undone here.
    """
    return crc32c.crc32c(data, seed ^ _ALL_ONES) ^ _ALL_ONES
