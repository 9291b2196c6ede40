"""Compressing whole files into ZFiles, and extracting them."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, cast

from obdlab.layerfiles.writing import CountingSink, write_packed

if TYPE_CHECKING:
    from obdlab.blob import Blob
    from obdlab.layerfiles.writing import Packing, Progress
    from obdlab.layers.sink import Sink

_STEP = 1 << 20


def compress_stream(
    source: BinaryIO, sink: Sink, packing: Packing, progress: Progress | None = None, *, name: str = "stream"
) -> int:
    """Compress ``source`` to its end into ``sink``; return its length. ``progress`` gets uncompressed bytes.

    If both can seek, blocks of 64 KiB are replaced by smaller ones where necessary (see ``write_packed``, also for
    ``name``). Raises ZFileWriteError for content that has no ZFile with these options, PackingError for a tar into a
    sink that cannot seek.
    """

    def copy(target: Sink) -> int:
        length = 0
        # read() returns what a pipe holds at the moment, so this streams.
        while data := source.read(_STEP):
            target.write(data)
            length += len(data)
        return length

    if isinstance(sink, io.IOBase) and sink.seekable() and source.seekable():
        begin = source.tell()

        def copy_whole(target: Sink) -> int:
            source.seek(begin)
            return copy(target)

        return write_packed(cast("BinaryIO", sink), packing, copy_whole, name=name, progress=progress)[0]
    with packing.around(sink) as packed:
        return copy(packed if progress is None else CountingSink(packed, progress))


def extract(content: Blob, file: BinaryIO, *, sparse: bool, progress: Progress | None = None) -> None:
    """Write all of ``content`` to ``file``. ``sparse`` leaves a hole for each 1 MiB of zeros; the file must seek.

    Another thread reads and unpacks the next piece while one is written.
    """
    size = content.size

    def read(offset: int) -> bytes:
        return content.read_at(offset, min(_STEP, size - offset)) if offset < size else b""

    zeros = bytes(_STEP)
    with ThreadPoolExecutor(1, "extract") as ahead:
        data, offset = read(0), 0
        while data:
            offset += len(data)
            coming = ahead.submit(read, offset)
            if sparse and data == (zeros if len(data) == _STEP else bytes(len(data))):
                file.seek(len(data), os.SEEK_CUR)
            else:
                file.write(data)
            if progress is not None:
                progress(len(data))
            data = coming.result()
    if sparse:
        file.truncate(size)
