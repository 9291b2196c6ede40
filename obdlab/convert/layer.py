"""One overlaybd layer: what an OCI layer changes on the disk of the layers below it.

The disk is a writable layer over the layers built so far, and ext4 is written to it in user space: no mount, no
device, no privileges. What the layer's files and the file system's own blocks changed is in the writable layer;
committed and compressed it is the layer blob: LSMT in a ZFile in a tar. Every layer states the disk's size; the
original writes 0 into all but the lowest, and reads either.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.convert.apply import ApplyStatistics, apply_layer
from obdlab.convert.tree import Ext4Tree
from obdlab.errors import SourceError
from obdlab.ext4.mkfs import make_filesystem
from obdlab.image.open import open_stack
from obdlab.layers.commit import Committed, commit
from obdlab.layers.stack import WritableStack
from obdlab.layers.tarwrap import TarWrapWriter
from obdlab.layers.upper import SparseUpper
from obdlab.layers.zfile import ZFileWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from obdlab.blob import Buffer

#: The file system that layers are written in.
FS_TYPE = "ext4"
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """How layers are written. Sizes in bytes; the defaults are the original's."""

    #: "lz4" or "zstd".
    algorithm: str = "lz4"
    #: A power of two from 4 KiB to 64 KiB.
    block_size: int = 4096
    #: Size of the disk that containers see. Costs nothing where it is empty.
    virtual_size: int = 64 * GIB


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    """A finished layer blob, and what making it took."""

    path: Path
    digest: str
    size: int
    #: Index records, and bytes of disk blocks before compression.
    segments: int
    data_size: int
    applied: ApplyStatistics
    #: Seconds by phase: apply (with reading the source), commit, digest.
    seconds: dict[str, float] = field(default_factory=dict)


class LayerBuilder:
    """Builds the layers of one image, bottom first, in ``work_dir``; each is built on all before it.

    ``work_dir`` must be on a file system with sparse files. The same layers give the same bytes, whoever builds them
    where and when.
    """

    def __init__(self, work_dir: Path, options: LayerOptions) -> None:
        self._work_dir = work_dir
        self._options = options
        self._built: list[BuiltLayer] = []

    @property
    def built(self) -> Sequence[BuiltLayer]:
        """The layers so far, bottom first."""
        return self._built

    def build(self, tar: Iterable[bytes], *, blob: str, uuid: str, parent_uuid: str | None) -> BuiltLayer:
        """Turn one OCI layer, given as pieces of its uncompressed tar, into a layer blob on those built before.

        ``blob`` names the layer in errors. Raises FormatError for a bad tar, ApplyError if it cannot be written,
        SourceError if the work directory fails, and what ``tar`` raises.
        """
        number = len(self._built)
        directory = self._work_dir / f"layer-{number:03d}"
        clock = _Clock()
        try:
            directory.mkdir()
            upper = directory / "writable_data"
            SparseUpper.create(upper, self._options.virtual_size, uuid=uuid, parent_uuid=parent_uuid).close()
            applied = self._apply(tar, blob, upper)
            clock.lap("apply")
            target = self._work_dir / f"{number:03d}.obd"
            committed = self._commit(upper, target)
            clock.lap("commit")
            digest = _digest(target)
            clock.lap("digest")
        except OSError as error:
            raise SourceError(f"cannot build the layer: {error.strerror or error}", blob=str(directory)) from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        layer = BuiltLayer(
            path=target,
            digest=digest,
            size=target.stat().st_size,
            segments=committed.records,
            data_size=committed.data_sectors * 512,
            applied=applied,
            seconds=clock.laps,
        )
        self._built.append(layer)
        return layer

    def _apply(self, tar: Iterable[bytes], blob: str, upper: Path) -> ApplyStatistics:
        lowers = open_stack([layer.path for layer in self._built]) if self._built else None
        with closing(WritableStack(lowers, SparseUpper.open(upper))) as disk:
            if lowers is None:
                make_filesystem(disk)
            tree = Ext4Tree(disk)
            # One that has read() for parsers, over pieces of any size.
            with _Pieces(tar) as raw:
                applied = apply_layer(raw, blob, tree)
            tree.finish()
        return applied

    def _commit(self, upper: Path, target: Path) -> Committed:
        options = self._options
        with SparseUpper.open(upper) as layer, target.open("xb") as file:
            wrapped = TarWrapWriter(file)
            compressed = ZFileWriter(wrapped, options.block_size, options.algorithm)
            committed = commit(layer, compressed, uuid=layer.uuid)
            compressed.close()
            wrapped.close()
        return committed


class _Pieces(io.RawIOBase):
    # A binary file over an iterator of bytes.
    def __init__(self, pieces: Iterable[bytes]) -> None:
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


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.laps[phase] = now - self._last
        self._last = now


def _digest(path: Path) -> str:
    # After the fact: the headers are rewritten at the end. The file is in the page cache still.
    with path.open("rb", buffering=0) as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def layer_uuid(chain_id: str) -> str:
    """Return a layer's UUID by the original's rule: the first 32 hex digits of the OCI layer's chain ID."""
    text = chain_id.removeprefix("sha256:")[:32]
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])).upper()
