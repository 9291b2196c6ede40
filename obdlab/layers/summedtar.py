"""An uncompressed tar whose pieces are compared with their digests before a byte of them is returned."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.tarsums import HEADER_SIZE, SUM_SIZE, SumsHeader
from obdlab.observe.counters import CHECKSUM_FAILURES, CORRUPTIONS_HEALED

if TYPE_CHECKING:
    from obdlab.call import Call
    from obdlab.layers.spancache import SpanCache

logger = logging.getLogger(__name__)


class SummedTar(Blob):
    """The tar ``below``, checked by the file of ``sums`` (:mod:`obdlab.formats.tarsums`). Both belong to it.

    The last pieces stay in memory, in ``spans``. A wrong piece is logged and counted, the blobs below forget it, and
    it is read once more. The constructor raises FormatError if the sums are malformed or of a tar of another size;
    then nothing belongs to it. A read raises CorruptBlobError.
    """

    below: Blob

    def __init__(self, below: Blob, sums: Blob, spans: SpanCache) -> None:
        self.name = below.name
        self.below = below
        self._sums = sums
        self._spans = spans
        self._owner = spans.new_owner()
        head = sums.read_at(0, min(HEADER_SIZE, sums.size))
        header = SumsHeader.from_bytes(head, file_size=sums.size, blob=sums.name)
        if header.tar_size != below.size:
            raise FormatError("tar sums are of another tar", blob=sums.name, got=header.tar_size, wanted=below.size)
        self._piece = header.piece

    @property
    def size(self) -> int:
        return self.below.size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        end, parts = offset + length, []
        while offset < end:
            number, skipped = divmod(offset, self._piece)
            piece = self._checked(number, call)
            part = piece[skipped : skipped + end - offset]
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def map_range(self, begin: int, end: int) -> tuple[int, int]:
        check_range(self, begin, end - begin)
        if begin == end:
            return begin, end
        return begin - begin % self._piece, min(self.size, -(-end // self._piece) * self._piece)

    def piece(self, offset: int) -> tuple[int, int] | None:
        check_range(self, offset, 1)
        return self.map_range(offset, offset + 1)

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if length:
            self._spans.drop(self._owner, offset // self._piece, (offset + length - 1) // self._piece)
        super().evict(offset, length)

    def close(self) -> None:
        self._spans.drop(self._owner, 0, self.size // self._piece)
        self._sums.close()
        self.below.close()

    def _checked(self, number: int, call: Call | None) -> bytes:
        return self._spans.get((self._owner, number), lambda: self._read(number, call), call)

    def _read(self, number: int, call: Call | None) -> bytes:
        begin = number * self._piece
        length = min(self._piece, self.size - begin)
        wanted = self._sums.read_at(HEADER_SIZE + number * SUM_SIZE, SUM_SIZE, call)
        piece = self.below.read_at(begin, length, call)
        if hashlib.sha256(piece).digest() == wanted:
            return piece
        error = self._refuse(begin, length)
        piece = self.below.read_at(begin, length, call)
        if hashlib.sha256(piece).digest() != wanted:
            raise error
        CORRUPTIONS_HEALED.add(label="target")
        return piece

    def _refuse(self, begin: int, length: int) -> CorruptBlobError:
        error = CorruptBlobError(
            "content of the target does not match the turboOCI layer's sums", blob=self.name, offset=begin
        )
        CHECKSUM_FAILURES.add(label="target")
        logger.warning("%s", error)
        self.below.evict(begin, length)
        return error
