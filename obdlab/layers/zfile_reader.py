"""A ZFile seen as the blob it was compressed from."""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from contextlib import suppress
from itertools import pairwise, repeat
from typing import TYPE_CHECKING

from crc32c import crc32c

from obdlab.blob import Blob, check_range
from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.zfile.codec import codec_for
from obdlab.formats.zfile.jumptable import JumpTable, check_bounds
from obdlab.formats.zfile.layout import BLOCK_CRC_SEED, CRC_SIZE, HEADER_SIZE, Flags, ZFileHeader
from obdlab.layers.native import unpacker
from obdlab.observe.counters import CHECKSUM_FAILURES, CORRUPTIONS_HEALED, DECOMPRESSION_FAILURES

if TYPE_CHECKING:
    from obdlab.blob import Buffer
    from obdlab.call import Call
    from obdlab.layers.budget import Share

#: Most compressed bytes in one read of the blob below. Larger reads are split, to bound memory.
MAX_RUN = 1 << 20
#: Retries of a damaged block or index, each after evicting its cached copy.
BLOCK_RETRIES = 3
INDEX_RETRIES = 2
#: Largest dictionary accepted. No known writer makes any, and useful ones have about 100 KiB.
MAX_DICTIONARY = 16 << 20
# Block CRCs are raw (not inverted at either end); those of the library are inverted. The seed is inverted here once,
# and results are compared with the inverted value.
_SEED = BLOCK_CRC_SEED ^ 0xFFFFFFFF
_ALL_ONES = 0xFFFFFFFF
_CRC = struct.Struct("<I")


def open_zfile(blob: Blob, share: Share | None = None) -> ZFileReader:
    """Open ``blob`` as a ZFile. The reader then owns it; it stays the caller's if this raises.

    The block table's memory is taken from ``share``, if given. Raises FormatError if the blob is not a ZFile, its
    index points outside or the share is too small, CorruptBlobError if a checksum is wrong.
    """
    return ZFileReader(blob, share)


class ZFileReader(Blob):
    """The decompressed content of a ZFile, checking every block's CRC before it is decompressed.

    Opening reads the header, the trailer (unless the header was overwritten with the final values) and the index.
    A block that fails its check is evicted from the caches below and read again, up to three times; then
    CorruptBlobError names the blob and the offset of the stored block. The compressed file is the blob below.
    """

    below: Blob

    def __init__(self, blob: Blob, share: Share | None = None) -> None:
        self.name = blob.name
        self.below = blob
        self.header, self._table = _load(blob, share)
        self._codec = codec_for(self.header.algorithm, dictionary=_dictionary(blob, self.header), blob=blob.name)
        self._size = self.header.original_size
        self._block_size = self.header.block_size
        # Looked up once, for reads of one block, which are the most frequent.
        self._offsets = self._table.offsets
        self._last_block = len(self._table) - 1
        self._read_stored = blob.read_at
        self._decompress = self._codec.decompress
        self._crc_size = CRC_SIZE if self.header.verify else 0
        native = unpacker(self._offsets, self.header)
        self._unpack = None if native is None else native.read
        self._unpack_into = None if native is None else native.read_into
        # Compiled code reads a local file itself.
        found = None if native is None else blob.in_file()
        self._from_file = None if native is None or found is None else (native.pread, native.pread_into, *found)

    @property
    def size(self) -> int:
        return self._size

    def map_range(self, begin: int, end: int) -> tuple[int, int]:
        check_range(self, begin, end - begin)
        if begin == end:
            return 0, 0
        bounds = self._table.boundaries(begin // self._block_size, (end - 1) // self._block_size + 1)
        return bounds[0], bounds[-1]

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        block_size = self._block_size
        end = offset + length
        if offset < 0 or length <= 0 or end > self._size:
            check_range(self, offset, length)
            return b""
        if self._from_file is not None:
            pread, _, file, start = self._from_file
            held = file.descriptor  # until the read is over
            content = None if held is None else pread(held.number, start, offset, length)
            if content is not None:
                return content
            # Closed, damaged, or too long: found below.
        first = offset // block_size
        last = (end - 1) // block_size
        if self._unpack is not None:
            offsets = self._offsets
            begin = offsets[first]
            run = offsets[last + 1] - begin
            if run <= MAX_RUN:
                try:
                    content = self._unpack(self._read_stored(begin, run, call), offset, length)
                except CorruptBlobError:
                    # Found by the blob below. One block is read again, as without the compiled code.
                    if first != last:
                        raise
                    content = None
                if content is not None:
                    return content
            elif first != last:
                return self._read_in_parts(offset, length, call)
            # A block is damaged. What follows finds it, and reads it again.
        if first == last:
            # Nearly every small read. All in one function: each call would cost a fortieth.
            offsets = self._offsets
            begin = offsets[first]
            try:
                stored = self._read_stored(begin, offsets[first + 1] - begin, call)
                if first == self._last_block or not self._crc_size or crc32c(stored, _SEED) != _ALL_ONES:
                    block = self._decode(stored, first)
                else:
                    block = self._decompress(stored[:-CRC_SIZE], block_size)
            except CorruptBlobError:
                block = self._read_again(first, call)
            if length == block_size:
                return block
            start = offset - first * block_size
            return block[start : start + length]
        # Decompressed straight into the bytes that are returned: only BytesIO can fill a bytes object in place, and
        # it returns it uncopied if it is exactly full.
        out = io.BytesIO(bytes(length))
        with out.getbuffer() as view:
            self._fill(view, offset, first, last + 1, call)
        return out.getvalue()

    def read_into(self, offset: int, out: memoryview, call: Call | None = None) -> None:
        end = offset + len(out)
        if self._unpack_into is not None and 0 <= offset < end <= self._size:
            if self._from_file is not None:
                _, pread_into, file, start = self._from_file
                held = file.descriptor
                if held is not None and pread_into(held.number, start, offset, out):
                    return
            offsets = self._offsets
            begin = offsets[offset // self._block_size]
            run = offsets[(end - 1) // self._block_size + 1] - begin
            with suppress(CorruptBlobError):  # read again below, as without the compiled code
                if run <= MAX_RUN and self._unpack_into(self._read_stored(begin, run, call), offset, out):
                    return
        out[:] = self.read_at(offset, len(out), call)

    def _read_in_parts(self, offset: int, length: int, call: Call | None) -> bytes:
        # Halves of a read whose stored bytes are more than MAX_RUN, parted where a block begins.
        middle = offset + length // 2
        middle -= middle % self._block_size
        if middle <= offset:
            middle += self._block_size
        part = middle - offset
        return self.read_at(offset, part, call) + self.read_at(middle, length - part, call)

    def _fill(self, view: memoryview, offset: int, begin: int, end: int, call: Call | None) -> None:
        # Reads blocks [begin, end) into the view, whose first byte is the content's byte `offset`.
        bounds = self._table.boundaries(begin, end)
        count = end - begin
        done = 0
        while done < count:
            # As many whole blocks as fit into MAX_RUN, at least one.
            stop = max(bisect_right(bounds, bounds[done] + MAX_RUN) - 1, done + 1)
            run = memoryview(self.below.read_at(bounds[done], bounds[stop] - bounds[done], call))
            self._decode_run(view, offset, run, begin + done, bounds[done : stop + 1], call)
            done = stop

    def _decode_run(
        self, view: memoryview, offset: int, run: memoryview, block: int, bounds: list[int], call: Call | None
    ) -> None:
        block_size = self._block_size
        crc_size = self._crc_size
        decompress_into = self._codec.decompress_into
        crc = crc32c
        unpack_crc = _CRC.unpack_from
        limit = len(view)
        base = bounds[0]
        begin = 0
        position = block * block_size - offset
        if self._codec.batches and position >= 0:
            whole = min(len(bounds) - 1, (limit - position) // block_size)
            if whole > 1 and self._decode_batch(
                view[position : position + whole * block_size], run, bounds[: whole + 1]
            ):
                begin = bounds[whole] - base
                position += whole * block_size
                block += whole
                bounds = bounds[whole:]
        for boundary in bounds[1:]:
            end = boundary - base
            data = run[begin : end - crc_size]
            to = position + block_size
            sound = True
            try:
                if crc_size and crc(data, _SEED) ^ _ALL_ONES != unpack_crc(run, end - CRC_SIZE)[0]:
                    sound = False
                    CHECKSUM_FAILURES.add(label="zfile")
                elif position >= 0 and to <= limit:
                    decompress_into(data, view[position:to])
                else:
                    self._copy_part(view, position, self._codec.decompress(data, self._length_of(block)))
            except CorruptBlobError:
                sound = False
                DECOMPRESSION_FAILURES.add()
            # Not in the handler: an error raised there would refer to this one, whose frames refer to a slice of the
            # view, for longer than the buffer may live.
            if not sound:
                self._copy_part(view, position, self._read_again(block, call))
            begin = end
            position = to
            block += 1

    def _decode_batch(self, out: memoryview, run: memoryview, bounds: list[int]) -> bool:
        # Decodes whole blocks together. Returns False if any is damaged; the block by block path then finds it.
        base = bounds[0]
        blocks: list[Buffer] = [run[begin:end] for begin, end in pairwise([bound - base for bound in bounds])]
        if self._crc_size:
            # Data followed by its own raw CRC has this constant CRC.
            if list(map(crc32c, blocks, repeat(_SEED))).count(_ALL_ONES) != len(blocks):
                return False
            blocks = [block[:-CRC_SIZE] for block in blocks]
        try:
            self._codec.decompress_all(blocks, out)
        except CorruptBlobError:
            return False
        return True

    def _copy_part(self, view: memoryview, position: int, block: bytes) -> None:
        # Copies the part of a block at `position` (perhaps before the view, or reaching past it) that lies in the
        # view.
        begin = max(position, 0)
        end = min(position + len(block), len(view))
        view[begin:end] = block[begin - position : end - position]

    def _length_of(self, block: int) -> int:
        return min(self._block_size, self._size - block * self._block_size)

    def _decode(self, stored: bytes, block: int) -> bytes:
        data: Buffer = stored
        if self._crc_size:
            if crc32c(stored, _SEED) != _ALL_ONES:  # data followed by its own raw CRC has this CRC
                CHECKSUM_FAILURES.add(label="zfile")
                (wanted,) = _CRC.unpack_from(stored, len(stored) - CRC_SIZE)
                raise CorruptBlobError("CRC of ZFile block does not match", wanted=f"{wanted:#010x}")
            data = memoryview(stored)[:-CRC_SIZE]
        try:
            return self._decompress(data, self._length_of(block))
        except CorruptBlobError:
            DECOMPRESSION_FAILURES.add()
            raise

    def _read_again(self, block: int, call: Call | None) -> bytes:
        begin, end = self._table.boundaries(block, block + 1)
        retries = BLOCK_RETRIES
        while True:
            self.below.evict(begin, end - begin)
            retries -= 1
            try:
                data = self._decode(self.below.read_at(begin, end - begin, call), block)
                CORRUPTIONS_HEALED.add(label="zfile")
                return data
            except CorruptBlobError as error:
                if retries:
                    continue
                raise CorruptBlobError(
                    f"{error.what} (block {block}, {end - begin} stored bytes, read {BLOCK_RETRIES + 1} times)",
                    blob=self.name,
                    offset=begin,
                    got=error.got,
                    wanted=error.wanted,
                ) from error


def _load(blob: Blob, share: Share | None) -> tuple[ZFileHeader, JumpTable]:
    attempt = 0
    while True:
        try:
            header = read_description(blob)
            check_bounds(header, blob.size, blob=blob.name)
            if share is not None:
                share.take_blocks(header.index_size, blob.name)
            index = blob.read_at(header.index_offset, 4 * header.index_size)
            return header, JumpTable.from_index(index, header, blob=blob.name)
        except CorruptBlobError:
            attempt += 1
            if attempt > INDEX_RETRIES:
                raise
            blob.evict(0, blob.size)


def _dictionary(blob: Blob, header: ZFileHeader) -> bytes:
    # Its bounds were checked with those of the index. It has no checksum of its own, but every block's content has.
    if not header.use_dict or not header.dict_size:
        return b""
    if header.dict_size > MAX_DICTIONARY:
        raise FormatError(
            "ZFile dictionary is too large",
            blob=blob.name,
            offset=HEADER_SIZE,
            got=header.dict_size,
            wanted=f"<= {MAX_DICTIONARY}",
        )
    return blob.read_at(HEADER_SIZE, header.dict_size)


def read_description(blob: Blob) -> ZFileHeader:
    """Return the header of a ZFile that holds its final values, or else its trailer.

    Raises FormatError if the blob is not a ZFile or is cut short, CorruptBlobError if a digest is wrong.
    """
    if blob.size < 2 * HEADER_SIZE:
        raise FormatError("too short for a ZFile", blob=blob.name, got=blob.size, wanted=f">= {2 * HEADER_SIZE}")
    header = ZFileHeader.from_bytes(blob.read_at(0, HEADER_SIZE), blob=blob.name)
    if not header.is_header:
        raise FormatError("ZFile starts with a trailer", blob=blob.name, offset=0, got=f"flags {header.flags:#x}")
    if header.is_overwritten:
        return header
    return read_trailer(blob)


def read_trailer(blob: Blob) -> ZFileHeader:
    """Return the trailer of a ZFile. Raises as :func:`read_description` does."""
    offset = blob.size - HEADER_SIZE
    trailer = ZFileHeader.from_bytes(blob.read_at(offset, HEADER_SIZE), blob=blob.name, offset=offset)
    wanted = Flags.DATA | Flags.SEALED
    if trailer.flags & (Flags.HEADER | wanted) != wanted:
        raise FormatError(
            "ZFile trailer is not that of a sealed file",
            blob=blob.name,
            offset=offset,
            got=f"flags {trailer.flags:#x}",
            wanted=f"{int(wanted):#x} among them, {int(Flags.HEADER):#x} not",
        )
    return trailer
