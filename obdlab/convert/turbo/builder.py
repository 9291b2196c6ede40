"""The layers of one image as warp layers: built one on another, and compared with the tars they were made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Self

from obdlab.blob import Blob
from obdlab.convert.apply import ApplyStatistics, apply_layer
from obdlab.convert.compare.listing import differences, list_volume
from obdlab.convert.decompress import checked
from obdlab.convert.layer import pieces_file
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.convert.tree.memorytree import MemoryTree
from obdlab.convert.tree.target import Ext4Tree
from obdlab.errors import FormatError, ObdlabError, SourceError
from obdlab.formats.compression import MAGIC_SIZE, compression_of
from obdlab.formats.tarsums import PIECE_OF_COMPRESSED, PIECE_OF_PLAIN, TarSums
from obdlab.formats.turbofiles import INDEXES, MARKER, SUMS_FILE, meta_name
from obdlab.image.target import uncompressed_target
from obdlab.layerfiles.writing import Packing, write_packed
from obdlab.layers.gzipwriter import GzipIndexWriter, SeveralMembersError
from obdlab.layers.lsmt import open_layer
from obdlab.layers.spancache import SpanCache
from obdlab.layers.stack import Stack
from obdlab.layers.targetdisk import TargetDisk
from obdlab.layers.upper import SparseUpper
from obdlab.layers.warp import WarpLayer
from obdlab.layers.zstdwriter import ZstdIndexWriter
from obdlab.localfile import LocalFile
from obdlab.volumes.erofs.volume import Volume as ErofsVolume
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume as Ext4Volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from obdlab.convert.compare.listing import ReadableVolume
    from obdlab.convert.endpoints.layout import VerifiedFile
    from obdlab.convert.layer import LayerOptions

# As the original compresses them; its readers take others, too.
_PACKING = Packing("lz4", 4096)
_PIECE = 1 << 20
_SHOWN = 5
_WAY_OUT = "the target of a turboOCI layer; convert the image as a whole, without --as turbo-oci"
_VOLUMES: dict[str, Callable[[Blob], ReadableVolume]] = {"ext4": Ext4Volume, "erofs": ErofsVolume}


class TurboVerificationError(ObdlabError, code="turbo-verification"):
    """A turboOCI image does not read as the image it was made of. Nothing of it has been published."""


@dataclass(frozen=True, slots=True)
class TurboFiles:
    """The files of one layer's blob, by their names in it, and the work they took.

    ``records`` and ``own_size`` (bytes of metadata before compression) are sums over the file systems.
    """

    files: dict[str, Path]
    applied: ApplyStatistics
    records: int
    own_size: int
    seconds: dict[str, float] = field(default_factory=dict)


class TurboBuilder:
    """Builds the warp layers of one image for one or more ``filesystems``, bottom first, in ``work_dir``.

    A context manager. The same layers give the same bytes, on every machine and at any time. ``work_dir`` must be on
    a file system with sparse files. With ``several_members``, layers of several gzip members get an index that the
    original refuses to read; without it they are refused. ``zstd`` allows zstd layers, which the original refuses.
    """

    def __init__(
        self,
        work_dir: Path,
        options: LayerOptions,
        filesystems: Sequence[str],
        *,
        several_members: bool = False,
        zstd: bool = False,
    ) -> None:
        self._several_members = several_members
        self._zstd = zstd
        self._work_dir = work_dir
        self._options = options
        self._layers: dict[str, list[WarpLayer]] = {name: [] for name in filesystems}
        self._wanted = MemoryTree()
        self._spans = SpanCache(directory=str(work_dir))
        self._opened = ExitStack()
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def add(
        self, file: VerifiedFile, name: str, diff_id: str, advance: Callable[[int], None] = lambda _: None
    ) -> TurboFiles:
        """Build the next layer of the ordinary layer in ``file``, whose uncompressed tar has the digest ``diff_id``.

        ``name`` is the layer's in errors. ``advance`` is called with the bytes read from the file, which must stay
        until this builder is closed. Raises FormatError for a layer that cannot be a target, or that is malformed,
        CorruptBlobError if it has another digest, ApplyError, SourceError.
        """
        begin = time.monotonic()
        number, self._count = self._count, self._count + 1
        with file.as_blob() as blob:
            compression = compression_of(blob.read_at(0, min(MAGIC_SIZE, blob.size)))
        index = self._work_dir / f"{number:03d}.{INDEXES.get(compression, 'index')}"
        sums = TarSums(PIECE_OF_COMPRESSED if compression else PIECE_OF_PLAIN)
        target = self._opened.enter_context(self._target(file, compression, name, index, diff_id, sums, advance))
        seconds = {"read": time.monotonic() - begin}
        files: dict[str, Path] = {}
        records = own_size = 0
        applied = ApplyStatistics()
        for filesystem, layers in self._layers.items():
            begin = time.monotonic()
            meta = self._work_dir / f"{number:03d}.{meta_name(filesystem, compression)}"
            tar = checked(_pieces(target), name, diff_id)  # what readers will see, through the index
            applied, committed = self._build(filesystem, layers, tar, name, meta)
            opened = open_layer(LocalFile(meta), kind=partial(WarpLayer, target))
            self._opened.callback(opened.file.close)
            assert isinstance(opened, WarpLayer)
            layers.append(opened)
            files[meta_name(filesystem, compression)] = meta
            records += committed[0]
            own_size += committed[1]
            seconds[filesystem] = time.monotonic() - begin
        marker = self._work_dir / f"{number:03d}{MARKER}"
        marker.touch()
        files[MARKER] = marker
        if index.exists():
            files[INDEXES[compression]] = index
        files[SUMS_FILE] = self._work_dir / f"{number:03d}.{SUMS_FILE}"
        files[SUMS_FILE].write_bytes(sums.to_bytes())
        return TurboFiles(files, applied, records, own_size, seconds)

    def verify(self) -> None:
        """Read each file system through its warp layers and compare it with the ordinary layers' files.

        Raises TurboVerificationError with the first differences, and the errors of reading.
        """
        wanted = self._wanted.listing()
        for filesystem, layers in self._layers.items():
            found = differences(list_volume(_VOLUMES[filesystem](Stack(layers))), wanted)
            if found:
                more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
                raise TurboVerificationError(
                    f"{filesystem} differs from the image: {'; '.join(found[:_SHOWN])}{more}"
                )

    def _target(
        self,
        file: VerifiedFile,
        compression: str,
        name: str,
        index: Path,
        diff_id: str,
        sums: TarSums,
        advance: Callable[[int], None],
    ) -> Blob:
        # Returns the uncompressed tar of the layer, after reading all of the file once: for its index, and for the
        # files that it must read as.
        counted = _Counted(file, advance)
        if not compression:
            self._expect(sums.passing(iter(lambda: counted.read(_PIECE), b"")), name, diff_id)
            return file.as_blob()
        if compression == "zstd" and not self._zstd:
            what = f"layer cannot be {_WAY_OUT}, or with --zstd-layers for obdlab alone"
            raise FormatError(what, blob=name, got=compression, wanted="a tar or tar+gzip")
        if compression not in INDEXES:
            what = "layer is compressed as no image's layer may be: pack it again as tar+gzip"
            raise FormatError(what, blob=name, got=compression, wanted="a tar or tar+gzip")
        try:
            if compression == "zstd":
                frames = ZstdIndexWriter(blob=name)
                self._expect(sums.passing(frames.decompressed(counted)), name, diff_id)
                index.write_bytes(frames.to_bytes())
            else:
                with index.open("xb") as sink:
                    writer = GzipIndexWriter(sink, blob=name, several=self._several_members)
                    self._expect(sums.passing(writer.decompressed(counted)), name, diff_id)
        except SeveralMembersError as error:
            what = f"layer cannot be {_WAY_OUT}, or with --several-members ({error.what})"
            raise FormatError(what, blob=name) from error
        except OSError as error:
            raise SourceError(f"cannot write the index: {error.strerror or error}", blob=str(index)) from error
        stored = file.as_blob()
        try:
            return uncompressed_target(stored, str(index), self._spans)
        except BaseException:
            stored.close()
            raise

    def _expect(self, tar: Iterable[bytes], name: str, diff_id: str) -> None:
        apply_layer(pieces_file(checked(tar, name, diff_id)), name, self._wanted)

    def _build(
        self, filesystem: str, layers: Sequence[WarpLayer], tar: Iterable[bytes], name: str, meta: Path
    ) -> tuple[ApplyStatistics, tuple[int, int]]:
        upper = self._work_dir / f"{meta.name}.writable"
        try:
            with SparseUpper.create(upper, self._options.virtual_size) as layer, meta.open("xb") as file:
                disk = TargetDisk(Stack(layers) if layers else None, layer)
                tree: Ext4Tree | ErofsTree
                if filesystem == "erofs":
                    tree = ErofsTree(disk, fresh=not layers)
                else:
                    if not layers:
                        make_filesystem(disk, inode_ratio=self._options.inode_ratio)
                    tree = Ext4Tree(disk)
                applied = apply_layer(pieces_file(tar), name, tree)
                tree.finish()
                committed, _ = write_packed(file, _PACKING, disk.commit, name=name)
            upper.unlink()
        except OSError as error:
            raise SourceError(f"cannot build the layer: {error.strerror or error}", blob=str(upper)) from error
        return applied, (committed.records, committed.data_sectors * 512)


class _Counted:
    def __init__(self, file: VerifiedFile, advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._advance(len(data))
        return data


def _pieces(blob: Blob) -> Iterator[bytes]:
    for offset in range(0, blob.size, _PIECE):
        yield blob.read_at(offset, min(_PIECE, blob.size - offset))
