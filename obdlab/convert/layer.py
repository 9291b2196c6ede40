"""One overlaybd layer: what an OCI layer changes on the disk of the layers below it.

The disk is a writable device of obdlab's own over the layers built so far. What the layer's files and the file
system's own blocks changed is in the writable layer; committed and compressed it is the layer blob:
LSMT in a ZFile in a tar. Every layer states the disk's size; the original writes 0 into all but the lowest, and reads
either.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.convert.apply import ApplyError, ApplyStatistics
from obdlab.convert.filesystem import apply_to_device, make_filesystem
from obdlab.errors import DeviceError, ObdlabError, SourceError
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.layers.commit import Committed, commit
from obdlab.layers.tarwrap import TarWrapWriter
from obdlab.layers.upper import SparseUpper
from obdlab.layers.zfile import ZFileWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from obdlab.service.client import DeviceService

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
    #: Seconds by phase: attach, mkfs, apply (with reading the source), detach, commit, digest.
    seconds: dict[str, float] = field(default_factory=dict)


class LayerBuilder:
    """Builds the layers of one image, bottom first, in ``work_dir``; each is built on all before it.

    ``work_dir`` must be on a file system with sparse files. Whatever happens, no mount and no device stays.
    """

    def __init__(self, work_dir: Path, devices: DeviceService, options: LayerOptions) -> None:
        self._work_dir = work_dir
        self._devices = devices
        self._options = options
        self._token = secrets.token_hex(4)
        self._built: list[BuiltLayer] = []

    @property
    def built(self) -> Sequence[BuiltLayer]:
        """The layers so far, bottom first."""
        return self._built

    def build(self, tar: Iterable[bytes], *, blob: str, uuid: str, parent_uuid: str | None) -> BuiltLayer:
        """Turn one OCI layer, given as pieces of its uncompressed tar, into a layer blob on those built before.

        ``blob`` names the layer in errors. Raises FormatError for a bad tar, ApplyError if it cannot be written,
        DeviceError, SourceError if the work directory fails, and what ``tar`` raises.
        """
        number = len(self._built)
        directory = self._work_dir / f"layer-{number:03d}"
        clock = _Clock()
        try:
            directory.mkdir()
            upper = directory / "writable_data"
            SparseUpper.create(upper, self._options.virtual_size, uuid=uuid, parent_uuid=parent_uuid).close()
            config = self._save_config(directory, upper)
            applied = self._write(tar, config, blob, directory, clock)
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

    def _save_config(self, directory: Path, upper: Path) -> Path:
        # The index file of a sparse layer is empty, but must be named for the layer to count as writable.
        index = directory / "writable_index"
        index.touch()
        config = ImageConfig(
            lowers=tuple(LowerConfig(file=str(layer.path)) for layer in self._built),
            upper=UpperConfig(index=str(index), data=str(upper)),
        )
        path = directory / "config.v1.json"
        config.save(path)
        return path

    def _write(
        self, tar: Iterable[bytes], config: Path, blob: str, directory: Path, clock: _Clock
    ) -> ApplyStatistics:
        device_id = f"convert-{self._token}-{len(self._built)}"
        try:
            device = self._devices.attach(config, device_id)
            clock.lap("attach")
            fresh = not self._built
            try:
                if fresh:
                    make_filesystem(device.path)
                    clock.lap("mkfs")
                applied = apply_to_device(tar, device.path, blob=blob, work_dir=directory, fresh=fresh)
            except (ApplyError, DeviceError) as error:
                cause = self._devices.last_error(device_id)
                if not cause:
                    raise
                raise ApplyError(f"{error} (the device says: {cause})") from error
            clock.lap("apply")
        except BaseException:
            # What went wrong above is what the caller must hear of.
            with suppress(ObdlabError):
                self._devices.detach(device_id, force=True)
            raise
        self._devices.detach(device_id)
        clock.lap("detach")
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
