"""Inflating a part of a gzip file, from any border of two deflate blocks on, across the members of the file."""

from __future__ import annotations

import copy
import zlib
from typing import TYPE_CHECKING, Any

from isal import isal_zlib

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.gzipmember import MAX_HEADER, TRAILER_SIZE, header_length, parse_trailer

if TYPE_CHECKING:
    from types import ModuleType

# A raw deflate stream, without header and trailer. isal is twice as fast as zlib, lets go of the interpreter lock and
# takes a window. It cannot begin inside a byte: formats.gzipmember.begin_inside_byte.
_RAW = -15
_HINT = "convert the image fully, or make an index of all members"


class Inflater:
    """Inflates exactly ``length`` bytes, before which the content has the 32 KiB of ``window``.

    ``several``: the file may have several members. Errors name ``blob`` and the ``offset`` in it at which the part
    begins. ``sums`` are given the content, and check it at the end of each member. ``library`` is isal, or zlib,
    whose state can be copied.
    """

    def __init__(
        self,
        window: bytes,
        length: int,
        *,
        several: bool = False,
        sums: MemberSums | None = None,
        blob: str = "",
        offset: int = 0,
        library: ModuleType = isal_zlib,
    ) -> None:
        self._library = library
        self._several = several
        self._sums = sums
        self._blob = blob
        self._offset = offset
        self._length = length
        #: Bytes of content that are still to come.
        self.left = length
        self._parts: list[bytes] = []
        self._stream: Any = library.decompressobj(_RAW, window)
        # The bytes behind the end of a member, up to the next member's first block; None inside a member.
        self._behind: bytes | None = None

    def take(self, data: bytes) -> None:
        """Inflate the next compressed bytes. Raises CorruptBlobError if they do not, or to too much."""
        while data:
            if self._behind is not None:
                data = self._next_member(self._behind + data)
                continue
            try:
                piece = self._stream.decompress(data, self.left + 1)
            except self._library.error as error:
                raise self._damaged(f"gzip data does not inflate ({error})") from error
            self.left -= len(piece)
            if self.left < 0:
                raise self._damaged("gzip data inflates to more than the index says")
            self._parts.append(piece)
            if self._sums is not None:
                self._sums.add(piece)
            if not self._stream.eof:
                return
            data = self._stream.unused_data
            self._behind = b""

    def taken(self) -> bytes:
        """Return the content so far, and forget it."""
        parts, self._parts = self._parts, []
        return b"".join(parts)

    def copy(self) -> Inflater:
        """Return an inflater in the same state, without the content so far. Of those with zlib and without sums."""
        other = copy.copy(self)
        other.taken()
        other._stream = self._stream.copy()  # noqa: SLF001 - of the same class
        return other

    def end(self, *, last: bool) -> bytes:
        """Return the content, once all compressed bytes were given: those up to the next entry, or to the file's end.

        Raises CorruptBlobError if there is less than ``length``, or the end is not one of that kind.
        """
        if self.left:
            got = self._length - self.left
            raise self._damaged("gzip data inflates to less than the index says", got, self._length)
        if last:
            trailer = self.trailer()
            if self._sums is not None:
                self._sums.end(trailer)
        elif self._behind is not None:
            raise self._damaged("gzip data ends before the content that its index knows")
        return b"".join(self._parts)

    def trailer(self) -> bytes:
        """Return the trailer of the file's last member. Raises CorruptBlobError if it is cut, or not the last."""
        behind = self._behind
        if behind is None:
            raise self._damaged("gzip data goes on behind the content that its index knows")
        if len(behind) < TRAILER_SIZE:
            raise self._damaged("gzip file ends inside its trailer")
        if not _only_zeros(behind):
            raise self._damaged(f"gzip file goes on behind the last member that its index knows ({_HINT})")
        return behind[:TRAILER_SIZE]

    # Returns the bytes of the member that follows. Until its header is complete they are kept, without the zeros that
    # may fill up the file, so that the memory for them is bounded.
    def _next_member(self, data: bytes) -> bytes:
        if len(data) <= TRAILER_SIZE or _only_zeros(data):
            self._behind = data[: TRAILER_SIZE + 1]
            return b""
        if not self._several:
            raise self._damaged(f"gzip file of several members, of which the index knows the first alone ({_HINT})")
        try:
            length = header_length(data[TRAILER_SIZE:], blob=self._blob, offset=self._offset)
        except FormatError as error:
            if len(data) > TRAILER_SIZE + MAX_HEADER:
                raise self._damaged("gzip file: neither a member nor zeros behind a member") from error
            self._behind = data
            return b""
        if self._sums is not None:
            self._sums.end(data[:TRAILER_SIZE])
        self._behind = None
        self._stream = self._library.decompressobj(_RAW)
        return data[TRAILER_SIZE + length :]

    def _damaged(self, what: str, got: object = None, wanted: object = None) -> CorruptBlobError:
        return CorruptBlobError(what, blob=self._blob, offset=self._offset, got=got, wanted=wanted)


def _only_zeros(behind: bytes) -> bool:
    return not behind[TRAILER_SIZE:].strip(b"\0")


class MemberSums:
    """CRC and length of the gzip member that is being inflated."""

    def __init__(self, blob: str) -> None:
        self._blob = blob
        #: Bytes of the current member so far.
        self.length = 0
        self._crc = 0

    def add(self, data: bytes) -> None:
        """Add content."""
        self.length += len(data)
        self._crc = zlib.crc32(data, self._crc)

    def end(self, trailer: bytes) -> None:
        """Check the member against its trailer, and begin the next. Raises CorruptBlobError."""
        crc, length = parse_trailer(trailer)
        if (crc, length) != (self._crc, self.length & 0xFFFFFFFF):
            raise CorruptBlobError(
                "content does not match the CRC and length in the gzip trailer",
                blob=self._blob,
                got=f"{self._crc:#010x}, {self.length} bytes",
                wanted=f"{crc:#010x}, {length}",
            )
        self.length = self._crc = 0
