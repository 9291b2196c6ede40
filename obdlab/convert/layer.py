"""One overlaybd layer: the changes of an OCI layer to the disk of the layers below it.

The disk is a writable layer over the layers built so far, and ext4 is written to it in user space: no mount, no
device, no privileges. The writable layer then holds the changed blocks, of files and of the file system itself.
Committed and compressed it is the layer blob: LSMT in a ZFile in a tar, with the file system's metadata at its front
(:mod:`obdlab.layers.front`). Every layer states the disk's size; the
original writes 0 into all but the lowest, and reads either.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Self

from obdlab.convert.ahead import ahead
from obdlab.convert.apply import ApplyStatistics, apply_layer
from obdlab.convert.database import options_digest
from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.convert.tree.target import Ext4Tree
from obdlab.errors import SourceError
from obdlab.formats.zfile import DEFAULT_ALGORITHM, DEFAULT_BLOCK_SIZE
from obdlab.layerfiles.writing import Packing, write_packed
from obdlab.layers.front import commit_with_front
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import SparseUpper
from obdlab.system import abi
from obdlab.volumes.ext4.mkfs import INODE_RATIO, make_filesystem
from obdlab.volumes.ext4.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from obdlab.blob import Buffer, WritableBlob
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.ordering import SectorRange

#: Raised by each change that gives other bytes for the same layer and options.
OUTPUT_VERSION = 2
GIB = 1 << 30
# Pieces of the tar decompressed and hashed before they are applied.
_TAR_AHEAD = 6
_BUFFER = 1 << 20
# A smaller layer is compressed sooner than a process would have started.
_SMALL = 4 << 20
# Longest wait for a starting process to drop its copies of descriptors.
_FORK_S = 30.0


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Options of writing layers. Sizes in bytes; the defaults are the original's, except for the compression."""

    #: "lz4" or "zstd".
    algorithm: str = DEFAULT_ALGORITHM
    #: A power of two from 4 KiB to 64 KiB. (A layer with a block of 64 KiB that does not compress gets 32 KiB.)
    block_size: int = DEFAULT_BLOCK_SIZE
    #: Size of the disk that containers see. Unused space costs nothing.
    virtual_size: int = 64 * GIB
    #: "ext4" or "erofs".
    filesystem: str = "ext4"
    #: Bytes of the disk per inode of ext4.
    inode_ratio: int = INODE_RATIO

    def digest(self, **more: object) -> str:
        """Return 64 hex digits that identify all that decides a layer's bytes beside its content."""
        return options_digest({"version": OUTPUT_VERSION, **asdict(self), **more})


@dataclass(frozen=True, slots=True)
class TurboTarget:
    """A turboOCI layer beside its blob: digest and media type of its target, its own diff ID, digest of its sums."""

    digest: str
    media_type: str
    diff_id: str
    sums: str


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    """A finished layer blob, and the work it took. ``path`` is None if its place has the blob already."""

    path: Path | None
    digest: str
    size: int
    #: Index records, and bytes of disk blocks before compression.
    segments: int
    data_size: int
    applied: ApplyStatistics
    #: Seconds by phase: apply (with reading the source), commit, digest.
    seconds: dict[str, float] = field(default_factory=dict)
    #: None for a layer that is complete by itself.
    turbo: TurboTarget | None = None
    #: Text of the annotation that names the layer's hash tree; "" without a tree.
    hash_tree: str = ""

    @property
    def diff_id(self) -> str:
        """Digest of the uncompressed blob, as the image config names it; an overlaybd layer's is that of its blob."""
        return self.digest if self.turbo is None else self.turbo.diff_id


class LayerBuilder:
    """Builds the layers of one image, bottom first, in ``work_dir``; each is built on all before it.

    A context manager. A process of its own compresses a layer while the next is applied. It starts at once if
    ``large`` layers are to come, else when it is needed; small layers are compressed without it. ``work_dir`` must be
    on a file system with sparse files; it holds all layers, uncompressed and compressed. The same layers give the
    same bytes, on every machine and at any time.
    """

    def __init__(self, work_dir: Path, options: LayerOptions, *, large: bool = True) -> None:
        self._work_dir = work_dir
        self._options = options
        self._lowers: list[Layer] = []
        self._large = large
        spawn = multiprocessing.get_context("spawn")  # forking a process with threads may hang
        self._compressors = ProcessPoolExecutor(1, spawn, initializer=begin_compressing)
        self._small_compressors = ThreadPoolExecutor(1, "convert-compress")

    def __enter__(self) -> Self:
        if self._large:
            self._compressors.submit(os.getpid)  # starts the process
        return self

    def __exit__(self, *_: object) -> None:
        for compressors in (self._compressors, self._small_compressors):
            compressors.shutdown(cancel_futures=True)
        for lower in self._lowers:
            lower.close()

    def add_lower(self, layer: Layer) -> None:
        """Add a finished layer on top; the builder owns it from then on."""
        self._lowers.append(layer)

    def build(
        self, tars: Iterable[tuple[str, Iterable[Buffer]]], *, uuid: str, parent_uuid: str | None
    ) -> PendingLayer:
        """Apply one or more OCI layers on top as one layer: each a name for errors, and pieces of its tar.

        Raises FormatError for a malformed tar, ApplyError if it cannot be written, SourceError if the work directory
        fails; errors of ``tars`` pass through. The layer is compressed in the background.
        """
        number = len(self._lowers)
        upper = self._work_dir / f"{number:03d}.writable"
        target = self._work_dir / f"{number:03d}.obd"
        begin = time.monotonic()
        try:
            SparseUpper.create(upper, self._options.virtual_size, uuid=uuid, parent_uuid=parent_uuid).close()
            applied, metadata = self._apply(tars, upper)
            written = _open_own(upper, read_only=True)
            self._lowers.append(written)
            small = written.data.allocated_size <= _SMALL
        except OSError as error:
            raise SourceError(f"cannot build the layer: {error.strerror or error}", blob=str(upper)) from error
        seconds = {"apply": time.monotonic() - begin}
        try:
            compressors = self._small_compressors if small else self._compressors
            compressing = compressors.submit(_compress, upper, target, self._options, metadata)
        except BrokenProcessPool as error:
            raise _compressor_died(target) from error
        return PendingLayer(target, applied, seconds, compressing)

    def _apply(
        self, tars: Iterable[tuple[str, Iterable[Buffer]]], upper: Path
    ) -> tuple[ApplyStatistics, list[SectorRange]]:
        # Also returns the sectors of the file system's metadata.
        lowers = Stack(self._lowers) if self._lowers else None
        total = ApplyStatistics()
        count = 0
        with _open_own(upper) as layer:
            disk = WritableStack(lowers, layer)
            tree = self._tree(disk, fresh=lowers is None)
            for name, tar in tars:
                with ahead(tar, _TAR_AHEAD) as pieces, pieces_file(pieces) as raw:
                    applied = apply_layer(raw, name, tree)
                count += 1
                total.members += applied.members
                total.file_bytes += applied.file_bytes
                total.whiteouts += applied.whiteouts
            metadata = tree.finish()
            if count > 1 and self._options.filesystem == "ext4":
                _drop_free_blocks(disk)
        return total, metadata

    def _tree(self, disk: WritableBlob, *, fresh: bool) -> Ext4Tree | ErofsTree:
        if self._options.filesystem == "erofs":
            return ErofsTree(disk, fresh=fresh)
        if fresh:
            make_filesystem(disk, inode_ratio=self._options.inode_ratio)
        return Ext4Tree(disk)


def _drop_free_blocks(disk: WritableStack) -> None:
    # Blocks that one of several merged OCI layers wrote and a later one freed must not be in the layer.
    upper = disk.upper
    volume = Volume(disk)
    for first, count in volume.free_blocks():
        begin, end = first * volume.block_size, (first + count) * volume.block_size
        for sector, length, source, _ in upper.lookup(begin // 512, end // 512):
            if source >= 0:
                upper.discard(sector * 512, length * 512)


# No other opener uses these files. But a process started by another thread holds copies of their descriptors, and so
# their locks, from its fork to its exec.
def _open_own(path: Path, *, read_only: bool = False) -> SparseUpper:
    deadline = time.monotonic() + _FORK_S
    while True:
        try:
            return SparseUpper.open(path, read_only=read_only)
        except SourceError as error:
            if not error.temporary or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class PendingLayer:
    """An applied layer that is being compressed."""

    path: Path
    applied: ApplyStatistics
    seconds: dict[str, float]
    _compressing: Future[_Compressed]

    def result(self) -> BuiltLayer:
        """Wait for the finished layer. Raises SourceError if the work directory fails."""
        try:
            made = self._compressing.result()
        except BrokenProcessPool as error:
            raise _compressor_died(self.path) from error
        return BuiltLayer(
            path=self.path,
            digest=made.digest,
            size=made.size,
            segments=made.records,
            data_size=made.data_size,
            applied=self.applied,
            seconds={**self.seconds, **made.seconds},
        )


@dataclass(frozen=True, slots=True)
class _Compressed:
    size: int
    records: int
    data_size: int
    digest: str
    seconds: dict[str, float]


def _compress(upper: Path, target: Path, options: LayerOptions, metadata: Sequence[SectorRange]) -> _Compressed:
    # Runs in the compressing process.
    begin = time.monotonic()
    try:
        with _open_own(upper, read_only=True) as layer, target.open("xb", buffering=_BUFFER) as file:
            packing = Packing(options.algorithm, options.block_size, tar=True)
            committed, _ = write_packed(
                file,
                packing,
                lambda sink: commit_with_front(layer, sink, metadata, uuid=layer.uuid),
                name=f"layer {target.stem}",
            )
        middle = time.monotonic()
        # Hashed afterwards, since the headers are rewritten at the end. The file is still in the page cache.
        digest = digest_of_file(target)
        seconds = {"commit": middle - begin, "digest": time.monotonic() - middle}
        return _Compressed(target.stat().st_size, committed.records, committed.data_sectors * 512, digest, seconds)
    except OSError as error:
        raise SourceError(f"cannot build the layer: {error.strerror or error}", blob=str(target)) from error


def _compressor_died(target: Path) -> SourceError:
    return SourceError("the process that compresses layers was killed, or could not be started", blob=str(target))


def begin_compressing() -> None:
    """Prepare a process of a pool: it ends with its starter, and ignores the terminal's interrupts."""
    # An interrupt from the terminal is for the main process, which ends everything in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    abi.keep_freed_memory()  # each batch takes and frees a buffer
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


# The pool's queue does not end with a killed parent, as this process also holds the queue's writing end.
# PR_SET_PDEATHSIG only works for a parent with one thread: it is sent when the thread that started this process ends.
def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def pieces_file(pieces: Iterable[Buffer]) -> io.RawIOBase:
    """Return a binary file over an iterator of bytes, which can be read once, forwards."""
    return _Pieces(pieces)


class _Pieces(io.RawIOBase):
    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        memoryview(buffer)[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def layer_uuid(chain_id: str) -> str:
    """Return a layer's UUID by the original's rule: the first 32 hex digits of the OCI layer's chain ID."""
    text = chain_id.removeprefix("sha256:")[:32]
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])).upper()
