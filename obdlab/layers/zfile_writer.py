"""Writing a ZFile as a stream."""

from __future__ import annotations

from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import numpy as np

from obdlab.errors import ObdlabError
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.zfile.codec import ZSTD_LEVEL, codec_for
from obdlab.formats.zfile.layout import (
    MAX_BLOCK_SIZE,
    MIN_BLOCK_SIZE,
    Flags,
    ZFileHeader,
)
from obdlab.layers.native import packer
from obdlab.layers.sink import can_seek

if TYPE_CHECKING:
    from concurrent.futures import Future
    from types import TracebackType

    from obdlab.blob import Buffer
    from obdlab.layers.sink import Sink

# Bytes compressed at once and handed to the sink as one piece: a multiple of every block size.
_BATCH = 512 << 10
# Batches that may wait per worker, which bounds memory.
_AHEAD = 3
#: The largest blocks that hold any content within the limits of the original's reader.
FITTING_BLOCK_SIZE = 32 << 10


# Stored blocks, and the length of each.
_Batch = tuple["Buffer", list[int]]


class ZFileWriteError(ObdlabError, code="zfile-write"):
    """These options allow no readable ZFile of the content, or the writer was used after its end."""


class IncompressibleError(ZFileWriteError, code="incompressible"):
    """A block of 64 KiB does not compress: blocks of ``FITTING_BLOCK_SIZE`` can hold the content."""


class ZFileWriter:
    """Compress a stream into ``sink``, byte for byte as the original's tools, except for another ``level`` of zstd.

    ``block_size`` is a power of two from 4 KiB to 64 KiB, ``algorithm`` ``"lz4"`` or ``"zstd"``. With
    ``overwrite_header`` the header of a seekable sink is rewritten at the end, so that readers need not read the
    trailer; other sinks keep the first header, as uploads of the original do. ``verify=False`` leaves out the block
    CRCs. If ``workers`` is more than one, that many threads compress while the caller continues to read and write;
    the bytes are the same. Without compiled code (:mod:`obdlab.layers.native`) LZ4 blocks of less than 16 KiB take so
    little time that threads would mostly wait for each other: the calling thread compresses them alone.

    Only :meth:`close` makes the file readable: leaving a ``with`` block by an exception does not close it. The sink
    stays open, at the end of the file.
    """

    def __init__(
        self,
        sink: Sink,
        block_size: int = 4096,
        algorithm: str = "lz4",
        overwrite_header: bool = True,
        *,
        verify: bool = True,
        workers: int = 1,
        level: int = ZSTD_LEVEL,
    ) -> None:
        if workers < 1:
            raise ZFileWriteError(f"a ZFile needs at least one worker (got {workers})")
        if block_size & (block_size - 1) or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
            raise ZFileWriteError(f"block size is not a power of two from 4096 to 65536 (got {block_size})")
        self._sink = sink
        self._codec = codec_for(algorithm, level=level)
        self._pack = packer(self._codec.algorithm)
        self._block_size = block_size
        self._crc = verify
        self._rewritable = sink if overwrite_header and can_seek(sink) else None
        self._start = self._rewritable.tell() if self._rewritable else 0
        self._rest = bytearray()  # input shorter than a batch
        gains = self._pack is not None or block_size >= self._codec.threads_from
        self._threads = ThreadPoolExecutor(workers, "zfile-writer") if workers > 1 and gains else None
        self._pending: deque[Future[_Batch]] = deque()
        self._most_pending = _AHEAD * workers
        self._lengths = array("I")
        self._written = 0
        self._original_size = 0
        self._open = True
        self._header = ZFileHeader(
            flags=Flags.HEADER | Flags.DATA | Flags.DIGEST,
            block_size=block_size,
            algorithm=self._codec.algorithm,
            verify=verify,
        )
        self._emit(self._header.to_bytes())

    @property
    def original_size(self) -> int:
        """Bytes of input written so far."""
        return self._original_size

    @property
    def size(self) -> int:
        """Bytes of the ZFile so far; of the whole file once it is closed."""
        return self._written

    def write(self, data: Buffer) -> int:
        """Append ``data``, in chunks of any size. Returns its length.

        Raises ZFileWriteError if the writer is closed or has failed before, and, in this or a later call,
        IncompressibleError for a 64 KiB block that does not compress (the original's reader has no room for it).
        """
        self._check_open()
        self._open = False  # until this call succeeds
        view = memoryview(data).cast("B")
        length = len(view)
        self._original_size += length
        begin = 0
        if self._rest:
            begin = _BATCH - len(self._rest)
            self._rest += view[:begin]
            if len(self._rest) == _BATCH:
                self._add_batch(self._rest)
                self._rest = bytearray()
        for at in range(begin, length - _BATCH + 1, _BATCH):
            self._add_batch(view[at : at + _BATCH])
            begin = at + _BATCH
        self._rest += view[begin:]
        self._open = True
        return length

    def close(self) -> None:
        """Write buffered input, index and trailer, and the final header if it was asked for and the sink can seek.

        Raises ZFileWriteError if already closed, or if a write failed before.
        """
        self._check_open()
        self._open = False
        if self._rest:
            self._add_batch(self._rest)
        self._drain(0)
        self._stop()
        index = np.asarray(self._lengths, dtype="<u4").tobytes()
        final = replace(
            self._header,
            flags=Flags.DATA | Flags.SEALED | Flags.DIGEST,
            index_offset=self._written,
            index_size=len(self._lengths),
            original_size=self._original_size,
            index_crc=raw_crc32c(index),
        )
        self._emit(index)
        self._emit(final.to_bytes())
        if self._rewritable:
            flags = self._header.flags | Flags.OVERWRITTEN
            self._rewritable.seek(self._start)
            self._rewritable.write(replace(final, flags=flags).to_bytes())
            self._rewritable.seek(self._start + self._written)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._open:
                self.close()
        finally:
            self._stop()

    def _check_open(self) -> None:
        if not self._open:
            raise ZFileWriteError("ZFile writer is closed, or failed before")

    def _add_batch(self, data: Buffer) -> None:
        if self._threads is None:
            self._store(self._compress(memoryview(data)))
            return
        view = memoryview(data)
        if not isinstance(view.obj, bytes):
            view = memoryview(bytes(view))  # the caller may use its buffer again
        self._pending.append(self._threads.submit(self._compress, view))
        self._drain(self._most_pending)

    def _drain(self, most: int) -> None:
        while len(self._pending) > most:
            self._store(self._pending.popleft().result())

    def _stop(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _compress(self, data: memoryview) -> _Batch:
        # Runs in any thread.
        batch = self._pack(data, self._block_size, self._crc) if self._pack is not None else None
        if batch is not None:
            return batch
        return self._codec.store(data, self._block_size, crcs=self._crc)

    def _store(self, batch: _Batch) -> None:
        data, lengths = batch
        # The original reads through a buffer of 64 KiB. (Its other limit, 16-bit distances within 64 KiB of blocks,
        # cannot be reached: blocks of 32 KiB and less grow by too little.)
        if max(lengths) > MAX_BLOCK_SIZE:
            block, stored = next((n, stored) for n, stored in enumerate(lengths) if stored > MAX_BLOCK_SIZE)
            raise IncompressibleError(
                f"block {len(self._lengths) + block} does not compress and would be stored in {stored} bytes, more "
                f"than the original's reader can take ({MAX_BLOCK_SIZE}); use a block size of at most "
                f"{FITTING_BLOCK_SIZE}"
            )
        self._lengths.extend(lengths)
        self._emit(data)

    def _emit(self, data: Buffer) -> None:
        self._sink.write(data)
        self._written += len(data)
