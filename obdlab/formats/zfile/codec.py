"""Compression of one ZFile block: LZ4 block format, or one zstd frame.

Output is byte-identical to the original's: LZ4 as one-shot ``LZ4_compress_default`` with room for 512 bytes of growth
(less room gives other bytes), zstd at level 3. Decompressing never allocates more than the block's own size, whatever
the compressed bytes claim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import cramjam
import zstandard

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.zfile.layout import MAX_GROWTH, Algorithm

if TYPE_CHECKING:
    from obdlab.blob import Buffer

ZSTD_LEVEL = 3
ALGORITHM_NAMES = {"lz4": Algorithm.LZ4, "zstd": Algorithm.ZSTD}


class Codec(ABC):
    """One algorithm. Objects may be used by several threads."""

    algorithm: Algorithm

    @abstractmethod
    def compress(self, block: Buffer) -> Buffer:
        """Return ``block`` compressed."""

    @abstractmethod
    def compress_all(self, data: memoryview, block_size: int) -> list[Buffer]:
        """Return every ``block_size`` bytes of ``data`` compressed, as :meth:`compress` would one by one, but faster.

        The last block may be shorter.
        """

    @abstractmethod
    def decompress(self, data: Buffer, length: int) -> bytes:
        """Return the block in ``data``, or raise CorruptBlobError unless it is valid and ``length`` bytes long."""

    @abstractmethod
    def decompress_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        """Fill ``out`` with the block in ``data``. Raises CorruptBlobError unless it is valid and fits exactly."""


class Lz4(Codec):
    """LZ4 block format, without a size prefix."""

    algorithm = Algorithm.LZ4

    def compress(self, block: Buffer) -> Buffer:
        out = bytearray(len(block) + MAX_GROWTH)
        length = cramjam.lz4.compress_block_into(block, out, store_size=False)
        return memoryview(out)[:length]

    def compress_all(self, data: memoryview, block_size: int) -> list[Buffer]:
        # One buffer for all: a new one for each block of 4 KiB costs a quarter of the compression.
        blocks = -(-len(data) // block_size)
        out = memoryview(bytearray(len(data) + blocks * MAX_GROWTH))
        compress_into = cramjam.lz4.compress_block_into
        compressed: list[Buffer] = []
        at = 0
        for begin in range(0, len(data), block_size):
            block = data[begin : begin + block_size]
            end = at + compress_into(block, out[at : at + len(block) + MAX_GROWTH], store_size=False)
            compressed.append(out[at:end])
            at = end
        return compressed

    def decompress(self, data: Buffer, length: int) -> bytes:
        # Not cramjam's decompress_block: it pads a block that is too short, and does not tell.
        block = bytearray(length)
        self.decompress_into(data, block)
        return bytes(block)

    def decompress_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        length = len(out)
        try:
            got = cramjam.lz4.decompress_block_into(data, out, output_len=length)
        except cramjam.DecompressionError as error:
            raise _damaged("LZ4") from error
        if got != length:
            raise _wrong_length("LZ4", got, length)


class Zstd(Codec):
    """One zstd frame per block. A ``dictionary`` is for reading only: nobody writes blocks that need one."""

    algorithm = Algorithm.ZSTD

    def __init__(self, dictionary: bytes = b"") -> None:
        self._dictionary = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
        # Contexts that nobody uses now. A context must not be used by two threads at once, and making one costs more
        # than a block; taking from a list and giving back are atomic.
        self._compressors: list[zstandard.ZstdCompressor] = []
        self._decompressors: list[zstandard.ZstdDecompressor] = []

    def compress(self, block: Buffer) -> Buffer:
        compressor = self._take_compressor()
        data = compressor.compress(block)
        self._compressors.append(compressor)
        return data

    def compress_all(self, data: memoryview, block_size: int) -> list[Buffer]:
        blocks: list[Buffer] = [data[begin : begin + block_size] for begin in range(0, len(data), block_size)]
        if not blocks or "multi_compress_to_buffer" not in zstandard.backend_features:
            return [self.compress(block) for block in blocks]
        compressor = self._take_compressor()
        # One thread: who wants more calls this from several.
        frames = compressor.multi_compress_to_buffer(blocks, threads=1)
        self._compressors.append(compressor)
        return [frames[number].tobytes() for number in range(len(frames))]

    def _take_compressor(self) -> zstandard.ZstdCompressor:
        try:
            return self._compressors.pop()
        except IndexError:
            return zstandard.ZstdCompressor(level=ZSTD_LEVEL)

    def decompress(self, data: Buffer, length: int) -> bytes:
        pool = self._decompressors
        try:
            decompressor = pool.pop()
        except IndexError:
            decompressor = zstandard.ZstdDecompressor(dict_data=self._dictionary)
        try:
            # The frame's own claim decides how much is allocated, so it is read first (-1: no claim).
            claimed = zstandard.frame_content_size(data)
            if claimed not in (length, -1):
                raise _wrong_length("zstd", claimed, length)
            block = decompressor.decompress(data, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise _damaged("zstd") from error
        finally:
            pool.append(decompressor)
        if len(block) != length:
            raise _wrong_length("zstd", len(block), length)
        return block

    def decompress_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        out[:] = self.decompress(data, len(out))


def codec_for(algorithm: int | str, *, dictionary: bytes = b"", blob: str = "") -> Codec:
    """Return the codec of a header's algorithm number, or of a name (``"lz4"``, ``"zstd"``).

    Raises FormatError for any other, and for a dictionary with LZ4: no library that keeps a block's bounds takes one.
    """
    number = ALGORITHM_NAMES.get(algorithm) if isinstance(algorithm, str) else algorithm
    if number == Algorithm.LZ4:
        if dictionary:
            raise FormatError(
                "LZ4 blocks with a dictionary cannot be read", blob=blob, wanted="no dictionary, or zstd"
            )
        return Lz4()
    if number == Algorithm.ZSTD:
        return Zstd(dictionary)
    raise FormatError("unknown ZFile compression", blob=blob, got=algorithm, wanted="1 (lz4) or 2 (zstd)")


def _damaged(kind: str) -> CorruptBlobError:
    return CorruptBlobError(f"{kind} block does not decompress")


def _wrong_length(kind: str, got: int, wanted: int) -> CorruptBlobError:
    return CorruptBlobError(f"{kind} block has the wrong length", got=got, wanted=wanted)
