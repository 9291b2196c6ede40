"""Compression of one ZFile block: LZ4 block format, or one zstd frame.

Output is byte-identical to the original's: LZ4 as one-shot ``LZ4_compress_default`` with room for 512 bytes of growth
(less room gives other bytes), zstd at level 3. Decompressing never allocates more than the block's own size, also if
the compressed bytes claim more.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from itertools import repeat
from typing import TYPE_CHECKING, cast

import cramjam
import crc32c
import numpy as np
import zstandard

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.zfile import ALGORITHMS, Algorithm
from obdlab.formats.zfile.layout import BLOCK_CRC_SEED, CRC_SIZE, MAX_GROWTH

if TYPE_CHECKING:
    from obdlab.blob import Buffer

#: The original's level. Readers take blocks of any level.
ZSTD_LEVEL = 3
# Block CRCs are raw (not inverted at either end); those of the library are inverted.
_SEED = BLOCK_CRC_SEED ^ 0xFFFFFFFF
_ALL_ONES = 0xFFFFFFFF
_CRC = struct.Struct("<I")
_lz4_into = cramjam.lz4.decompress_block_into


class Codec(ABC):
    """One algorithm. Objects may be used by several threads."""

    algorithm: Algorithm
    #: True if :meth:`decompress_all` is supported.
    batches = True
    #: Smallest block with which several threads compress faster than one.
    threads_from = 0

    @abstractmethod
    def compress(self, block: Buffer) -> Buffer:
        """Return ``block`` compressed."""

    @abstractmethod
    def store(self, data: memoryview, block_size: int, *, crcs: bool) -> tuple[Buffer, list[int]]:
        """Compress every ``block_size`` bytes of ``data`` (the last block may be shorter) as a ZFile stores them.

        Each block is as :meth:`compress` returns it, followed by its CRC if ``crcs``. Returns all of them together,
        and the length of each with its CRC. Much faster than block by block.
        """

    @abstractmethod
    def decompress(self, data: Buffer, length: int) -> bytes:
        """Return the block in ``data``, or raise CorruptBlobError unless it is valid and ``length`` bytes long."""

    @abstractmethod
    def decompress_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        """Fill ``out`` with the block in ``data``. Raises CorruptBlobError unless it is valid and fits exactly."""

    @abstractmethod
    def decompress_all(self, blocks: list[Buffer], out: memoryview) -> None:
        """Fill ``out`` with the blocks, all of one length. Raises CorruptBlobError if any is damaged."""


class Lz4(Codec):
    """LZ4 block format, without a size prefix."""

    algorithm = Algorithm.LZ4
    # One block of 4 KiB takes 7 microseconds. Threads that pass the interpreter's lock around at that pace are slower
    # than one thread (two: 0.6 to 0.95 times as fast; at 16 KiB up to 1.3 times, and 1.8 times for zstd).
    threads_from = 16 << 10

    # No library that respects a block's bounds takes a dictionary.
    def __init__(self, dictionary: bytes = b"", level: int = 0, *, blob: str = "") -> None:
        if dictionary:
            raise FormatError(
                "LZ4 blocks with a dictionary cannot be read", blob=blob, wanted="no dictionary, or zstd"
            )

    def compress(self, block: Buffer) -> Buffer:
        out = bytearray(len(block) + MAX_GROWTH)
        length = cramjam.lz4.compress_block_into(block, out, store_size=False)
        return memoryview(out)[:length]

    def store(self, data: memoryview, block_size: int, *, crcs: bool) -> tuple[Buffer, list[int]]:
        # One buffer that is not zeroed first: with a new one for each block, 4 KiB blocks take a third longer.
        blocks = -(-len(data) // block_size)
        out = np.empty(len(data) + blocks * (MAX_GROWTH + CRC_SIZE), np.uint8).data
        compress_into = cramjam.lz4.compress_block_into
        lengths = []
        at = 0
        for begin in range(0, len(data), block_size):
            block = data[begin : begin + block_size]
            end = at + compress_into(block, out[at : at + len(block) + MAX_GROWTH], store_size=False)
            if crcs:
                _CRC.pack_into(out, end, crc32c.crc32c(out[at:end], _SEED) ^ _ALL_ONES)
                end += CRC_SIZE
            lengths.append(end - at)
            at = end
        return out[:at], lengths

    def decompress(self, data: Buffer, length: int) -> bytes:
        # Not cramjam's decompress_block: it silently pads a block that is too short. And not through
        # decompress_into: the extra call would cost a fortieth of a device's 4 KiB read.
        block = bytearray(length)
        try:
            got = _lz4_into(data, block, length)
        except cramjam.DecompressionError as error:
            raise _damaged("LZ4") from error
        if got != length:
            raise _wrong_length("LZ4", got, length)
        return bytes(block)

    def decompress_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        length = len(out)
        try:
            got = _lz4_into(data, out, length)
        except cramjam.DecompressionError as error:
            raise _damaged("LZ4") from error
        if got != length:
            raise _wrong_length("LZ4", got, length)

    def decompress_all(self, blocks: list[Buffer], out: memoryview) -> None:
        # map() loops inside the interpreter: a third less per block than a written loop.
        length = len(out) // len(blocks)
        into = [out[at : at + length] for at in range(0, len(out), length)]
        try:
            lengths = list(map(_lz4_into, blocks, into, repeat(length)))
        except cramjam.DecompressionError as error:
            raise _damaged("LZ4") from error
        if lengths.count(length) != len(blocks):
            raise _wrong_length("LZ4", min(lengths), length)


class Zstd(Codec):
    """One zstd frame per block. A ``dictionary`` is for reading only: no writer makes blocks that need one."""

    algorithm = Algorithm.ZSTD
    batches = "multi_decompress_to_buffer" in zstandard.backend_features

    def __init__(self, dictionary: bytes = b"", level: int = ZSTD_LEVEL, *, blob: str = "") -> None:
        self._level = level
        self._dictionary = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
        # Idle contexts. Two threads must not use one context at once, and making one costs more than a block.
        # list.pop and list.append are atomic.
        self._compressors: list[zstandard.ZstdCompressor] = []
        self._decompressors: list[zstandard.ZstdDecompressor] = []

    def compress(self, block: Buffer) -> Buffer:
        compressor = self._take_compressor()
        data = compressor.compress(block)
        self._compressors.append(compressor)
        return data

    def store(self, data: memoryview, block_size: int, *, crcs: bool) -> tuple[Buffer, list[int]]:
        parts: list[Buffer] = []
        for frame in self._compress_all(data, block_size):
            parts.append(frame)
            if crcs:
                parts.append(_CRC.pack(crc32c.crc32c(frame, _SEED) ^ _ALL_ONES))
        lengths = [len(part) for part in parts]
        if crcs:
            lengths = [length + CRC_SIZE for length in lengths[::2]]
        return b"".join(parts), lengths

    def _compress_all(self, data: memoryview, block_size: int) -> list[bytes]:
        blocks: list[Buffer] = [data[begin : begin + block_size] for begin in range(0, len(data), block_size)]
        if not blocks or "multi_compress_to_buffer" not in zstandard.backend_features:
            return [bytes(self.compress(block)) for block in blocks]
        compressor = self._take_compressor()
        # threads=1: callers that want more processors call this from several threads.
        frames = compressor.multi_compress_to_buffer(blocks, threads=1)
        self._compressors.append(compressor)
        return [frames[number].tobytes() for number in range(len(frames))]

    def _take_compressor(self) -> zstandard.ZstdCompressor:
        try:
            return self._compressors.pop()
        except IndexError:
            return zstandard.ZstdCompressor(level=self._level)

    def decompress(self, data: Buffer, length: int) -> bytes:
        decompressor = self._take_decompressor()
        try:
            # zstd allocates the size the frame claims, so the claim is checked first (-1: no claim).
            claimed = zstandard.frame_content_size(data)
            if claimed not in (length, -1):
                raise _wrong_length("zstd", claimed, length)
            block = decompressor.decompress(data, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise _damaged("zstd") from error
        finally:
            self._decompressors.append(decompressor)
        if len(block) != length:
            raise _wrong_length("zstd", len(block), length)
        return block

    def decompress_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        out[:] = self.decompress(data, len(out))

    def decompress_all(self, blocks: list[Buffer], out: memoryview) -> None:
        length = len(out) // len(blocks)
        decompressor = self._take_decompressor()
        try:
            # Given the sizes, the library allocates these in place of the frames' claims, and checks them.
            sizes = struct.pack("<Q", length) * len(blocks)
            content = decompressor.multi_decompress_to_buffer(blocks, decompressed_sizes=sizes, threads=1)
        except zstandard.ZstdError as error:
            raise _damaged("zstd") from error
        finally:
            self._decompressors.append(decompressor)
        for number in range(len(blocks)):
            out[number * length : (number + 1) * length] = cast("Buffer", content[number])

    def _take_decompressor(self) -> zstandard.ZstdDecompressor:
        try:
            return self._decompressors.pop()
        except IndexError:
            return zstandard.ZstdDecompressor(dict_data=self._dictionary)


_CODECS: dict[int, type[Lz4 | Zstd]] = {codec.algorithm: codec for codec in (Lz4, Zstd)}


def codec_for(algorithm: int | str, *, dictionary: bytes = b"", level: int = ZSTD_LEVEL, blob: str = "") -> Codec:
    """Return the codec of a header's algorithm number, or of a name (:data:`ALGORITHMS`); ``level`` is zstd's.

    Raises FormatError for any other, and for a dictionary that the codec cannot use.
    """
    number = ALGORITHMS.get(algorithm, 0) if isinstance(algorithm, str) else algorithm
    if number not in _CODECS:
        wanted = " or ".join(f"{each.value} ({each.label})" for each in ALGORITHMS.values())
        raise FormatError("unknown ZFile compression", blob=blob, got=algorithm, wanted=wanted)
    return _CODECS[number](dictionary, level, blob=blob)


def _damaged(kind: str) -> CorruptBlobError:
    return CorruptBlobError(f"{kind} block does not decompress")


def _wrong_length(kind: str, got: int, wanted: int) -> CorruptBlobError:
    return CorruptBlobError(f"{kind} block has the wrong length", got=got, wanted=wanted)
