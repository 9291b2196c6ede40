"""Bytes of the NBD protocol: numbers, structures, and the parsing of a client's options. Does no I/O.

Source: the NBD protocol (doc/proto.md), fixed newstyle negotiation, simple and structured replies.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from obdlab.errors import FormatError

MAGIC = 0x4E42444D41474943  # NBDMAGIC
OPTION_MAGIC = 0x49484156454F5054  # IHAVEOPT
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
#: Answer to EXPORT_NAME: size and transmission flags.
EXPORT = struct.Struct(">QH")
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
#: Magic, command flags, command, cookie, offset, length.
REQUEST = struct.Struct(">IHHQQI")
#: Magic, errno, cookie.
SIMPLE_REPLY = struct.Struct(">IIQ")
#: Magic, chunk flags, chunk type, cookie, length of the payload.
CHUNK = struct.Struct(">IHHQI")
OFFSET = struct.Struct(">Q")
ERROR = struct.Struct(">IH")
EXTENT = struct.Struct(">II")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

FIXED_NEWSTYLE = 1
NO_ZEROES = 2
#: Reserved bytes after :data:`EXPORT`, unless both sides agreed on NO_ZEROES.
EXPORT_PADDING = 124
CHUNK_DONE = 1
#: States of base:allocation.
EXTENT_HOLE = 1
EXTENT_ZERO = 2

#: Longest name or text (the protocol's limit), and longest option that this side reads.
MAX_STRING = 4096
MAX_OPTION = 16 << 10
#: Largest READ and WRITE (the protocol's default).
MAX_TRANSFER = 32 << 20
ALLOCATION = b"base:allocation"


class Option(IntEnum):
    """Options a client may send before it uses an export."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """Answers to options."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = 1 << 31 | 1
    INVALID = 1 << 31 | 3
    UNKNOWN = 1 << 31 | 6
    TOO_BIG = 1 << 31 | 9


class Info(IntEnum):
    """Information about an export in replies to INFO and GO."""

    EXPORT = 0
    NAME = 1
    BLOCK_SIZE = 3


class Export(IntFlag):
    """Transmission flags of an export."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    FLUSH = 4
    FUA = 8
    TRIM = 32
    WRITE_ZEROES = 64
    DF = 128
    MULTI_CONN = 256


class Command(IntEnum):
    """Requests."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Flag(IntFlag):
    """Flags of requests."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQUEST_ONE = 8


class Chunk(IntEnum):
    """Types of structured replies."""

    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1


def option_reply(option: int, kind: Reply, data: bytes = b"") -> bytes:
    """Return one answer to ``option``."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def lengthed(text: bytes) -> bytes:
    """Return ``text`` with its length before it."""
    return _U32.pack(len(text)) + text


@dataclass(frozen=True, slots=True)
class MetaQuery:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT: an export's name, and the contexts asked for."""

    export: bytes
    queries: tuple[bytes, ...]

    def wants_allocation(self, *, listing: bool) -> bool:
        """Whether base:allocation is asked for; in a listing, an empty query list and ``base:`` stand for all."""
        if listing and (not self.queries or b"base:" in self.queries):
            return True
        return ALLOCATION in self.queries


def parse_info(data: bytes) -> bytes:
    """Return the export's name that INFO or GO asks for. Raises FormatError."""
    name, at = _string(data, 0)
    (count,) = _unpack(_U16, data, at)
    if len(data) != at + _U16.size + count * _U16.size:
        raise FormatError("option INFO or GO", got=f"{len(data)} bytes", wanted=f"{count} requests after the name")
    return name


def parse_meta(data: bytes) -> MetaQuery:
    """Return the data of a meta context option. Raises FormatError."""
    export, at = _string(data, 0)
    (count,) = _unpack(_U32, data, at)
    at += _U32.size
    if count > len(data):
        raise FormatError("meta context option", got=f"{count} queries", wanted=f"as many as {len(data)} bytes hold")
    queries = []
    for _ in range(count):
        query, at = _string(data, at)
        queries.append(query)
    if at != len(data):
        raise FormatError("meta context option", got=f"{len(data)} bytes", wanted=at)
    return MetaQuery(export, tuple(queries))


def _unpack(struct_: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
    if at + struct_.size > len(data):
        raise FormatError("an option ends early", got=f"{len(data)} bytes", wanted=f"{at + struct_.size} or more")
    return struct_.unpack_from(data, at)


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    (length,) = _unpack(_U32, data, at)
    begin = at + _U32.size
    if length > MAX_STRING or begin + length > len(data):
        raise FormatError("an option's text", got=f"{length} bytes", wanted=f"at most {len(data) - begin}")
    return data[begin : begin + length], begin + length
