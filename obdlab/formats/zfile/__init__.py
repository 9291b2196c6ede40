"""The ZFile format: seekable compression in independent blocks."""

from __future__ import annotations

from typing import Final

#: How commands, conversions and experiments compress unless asked for something else. On a slow link bytes count more
#: than processor time: an image of Python and its science packages is 96 MB so, and 145 MB with the original's lz4
#: and 4 KiB. The original reads both.
DEFAULT_ALGORITHM: Final = "zstd"
DEFAULT_BLOCK_SIZE: Final = 16 << 10
