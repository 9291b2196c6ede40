"""Writing layers to files: commit, packing, and target."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from obdlab.errors import ObdlabError
from obdlab.formats.lsmt.layout import HEADER_SPACE, RECORD_SIZE, SECTOR
from obdlab.formats.zfile import DEFAULT_ALGORITHM, DEFAULT_BLOCK_SIZE
from obdlab.formats.zfile.codec import ZSTD_LEVEL
from obdlab.layers.commit import ZeroBlocks, commit
from obdlab.layers.sink import can_seek
from obdlab.layers.tarwrap import TarWrapWriter
from obdlab.layers.zfile import FITTING_BLOCK_SIZE, IncompressibleError, ZFileWriter
from obdlab.system.newfile import new_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Buffer
    from obdlab.layers.commit import Committed
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.sink import SeekableSink, Sink
    from obdlab.layers.stack import Stack

log = logging.getLogger(__name__)

#: Called with the number of further bytes done; negative if some must be done again.
Progress = Callable[[int], object]
T = TypeVar("T")
#: Threads that compress, unless it is said otherwise: their number changes no byte.
WORKERS = min(4, os.cpu_count() or 1)


class PackingError(ObdlabError, code="packing"):
    """An impossible way of packing: the original neither makes nor reads a tar around a plain layer."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How content is stored: compressed by ``algorithm`` ("lz4", "zstd", or "" for not at all), optionally in a tar.

    ``workers`` threads compress, zstd with this ``level``. Without ``rewrite_header`` a ZFile keeps the header that
    was written first, like a streamed one, so that its readers need the trailer. ``block_crcs=False`` leaves out the
    checksums.
    """

    algorithm: str = DEFAULT_ALGORITHM
    block_size: int = DEFAULT_BLOCK_SIZE
    tar: bool = False
    workers: int = WORKERS
    rewrite_header: bool = True
    block_crcs: bool = True
    level: int = ZSTD_LEVEL

    def __post_init__(self) -> None:
        if self.tar and not self.algorithm:
            raise PackingError("only compressed content is put into a tar (got tar without compression)")

    @contextmanager
    def around(self, sink: Sink) -> Iterator[Sink]:
        """Yield a sink whose content is written to ``sink`` packed; finished when the block succeeds."""
        if not self.algorithm:
            yield sink
            return
        if not self.tar:
            with self._compressed(sink) as compressed:
                yield compressed
            return
        with TarWrapWriter(_seekable(sink)) as wrapped, self._compressed(wrapped) as compressed:
            yield compressed

    def _compressed(self, sink: Sink) -> ZFileWriter:
        return ZFileWriter(
            sink,
            self.block_size,
            self.algorithm,
            self.rewrite_header,
            verify=self.block_crcs,
            workers=self.workers,
            level=self.level,
        )


def write_packed(
    file: BinaryIO,
    packing: Packing,
    write: Callable[[Sink], T],
    *,
    name: str,
    progress: Progress | None = None,
) -> tuple[T, int]:
    """Have ``write`` fill a new, empty file, packed; return its result and the size of the ZFile's blocks.

    If a block of 64 KiB does not compress, which the original could not read, the file is begun again with blocks of
    32 KiB, and a warning names ``name``; so ``write`` may be called twice. ``progress`` gets bytes before they are
    packed.
    """
    target: CountingSink | None = None

    def fill(packing: Packing) -> T:
        nonlocal target
        with packing.around(file) as sink:
            target = None if progress is None else CountingSink(sink, progress)
            return write(target or sink)

    try:
        return fill(packing), packing.block_size
    except IncompressibleError:
        pass
    log.warning(
        "%s: content does not compress in blocks of %d KiB, which the original could not read; stored in blocks of "
        "%d KiB", name, packing.block_size >> 10, FITTING_BLOCK_SIZE >> 10,
    )  # fmt: skip
    if progress is not None and target is not None:
        progress(-target.count)
    file.seek(0)
    file.truncate()
    return fill(replace(packing, block_size=FITTING_BLOCK_SIZE)), FITTING_BLOCK_SIZE


def write_layer(
    source: Layer | Stack,
    path: str | os.PathLike[str],
    packing: Packing,
    *,
    uuid: str = "",
    parent_uuid: str | None = None,
    user_tag: str = "",
    zero_blocks: ZeroBlocks = ZeroBlocks.KEEP,
    force: bool = False,
    progress: Progress | None = None,
) -> Committed:
    """Commit a layer, or flatten a stack, into a new file. ``progress`` gets bytes of the uncompressed layer.

    Raises OutputError if the file exists (unless ``force``), ValueError for a malformed UUID or a message that is too
    long, and the errors of the source; then nothing is left of the file.
    """

    def write(sink: Sink) -> Committed:
        return commit(source, sink, uuid=uuid, parent_uuid=parent_uuid, user_tag=user_tag, zero_blocks=zero_blocks)

    with new_file(path, force=force) as file:
        return write_packed(file, packing, write, name=str(path), progress=progress)[0]


def commit_size(source: Layer | Stack) -> int:
    """Return about how many uncompressed bytes committing ``source`` writes."""
    segments = source.index.segments()
    return 2 * HEADER_SPACE + int(segments.mapped_sectors.sum()) * SECTOR + len(segments) * RECORD_SIZE


class CountingSink:
    """Passes all data on, and reports its length."""

    def __init__(self, sink: Sink, progress: Progress) -> None:
        self._sink = sink
        self._progress = progress
        #: Bytes so far.
        self.count = 0

    def write(self, data: Buffer) -> int:
        """Append ``data``; returns its length."""
        self._sink.write(data)
        self.count += len(data)
        self._progress(len(data))
        return len(data)


def _seekable(sink: Sink) -> SeekableSink:
    if not can_seek(sink):
        raise PackingError("a tar's first block tells its size, so that it can only go where one can seek back")
    return sink
