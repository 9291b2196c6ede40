"""The outer structure of a zstd file: where its frames begin and end, without decoding them.

(RFC 8878, section 3.1)
"""

from __future__ import annotations

from typing import NamedTuple

from obdlab.errors import FormatError

MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"
#: Bytes of a frame's magic and header, at most.
MAX_FRAME_HEADER = 18
#: Bytes of the magic and the length of a skippable frame.
SKIPPABLE_HEADER = 8
BLOCK_HEADER = 3
#: Content of one block, at most; so many bytes of the file, too.
MAX_BLOCK = 128 << 10
CHECKSUM_SIZE = 4
_RLE, _RESERVED = 1, 3


class FrameHeader(NamedTuple):
    """A frame's header, magic included: its ``length``, and if a checksum follows the last block."""

    length: int
    has_checksum: bool


class BlockHeader(NamedTuple):
    """A block: bytes of the file behind its header, and if it is the frame's last one."""

    stored: int
    last: bool


def is_skippable(head: bytes) -> bool:
    """Return True if a skippable frame begins with these four bytes."""
    return head[1:4] == _SKIPPABLE and head[0] & 0xF0 == 0x50


def skippable_length(head: bytes) -> int:
    """Return the length of a skippable frame behind these eight bytes."""
    return int.from_bytes(head[4:8], "little")


def frame_header(head: bytes, *, blob: str, offset: int) -> FrameHeader:
    """Return the header of the frame that begins with ``head``, of which the first five bytes are enough.

    Raises FormatError naming ``blob`` and ``offset`` for anything else, and for a frame that needs a dictionary.
    """
    if head[:4] != MAGIC or len(head) < 5:
        raise FormatError("not a zstd frame", blob=blob, offset=offset, got=head[:4].hex(), wanted=MAGIC.hex())
    descriptor = head[4]
    single, content_flag = bool(descriptor & 0x20), descriptor >> 6
    if descriptor & 0x08:
        raise FormatError("zstd frame has a reserved bit set", blob=blob, offset=offset)
    if descriptor & 0x03:
        raise FormatError("zstd frame needs a dictionary", blob=blob, offset=offset)
    content = (1 if single else 0, 2, 4, 8)[content_flag]
    return FrameHeader(5 + (0 if single else 1) + content, bool(descriptor & 0x04))


def block_header(data: bytes, *, blob: str, offset: int) -> BlockHeader:
    """Return the block whose header these three bytes are. Raises FormatError for a malformed one."""
    value = int.from_bytes(data, "little")
    kind, size = value >> 1 & 3, value >> 3
    if len(data) < BLOCK_HEADER or kind == _RESERVED or size > MAX_BLOCK:
        raise FormatError("malformed zstd block", blob=blob, offset=offset, got=data.hex())
    return BlockHeader(1 if kind == _RLE else size, bool(value & 1))
