"""The baseline with zstd layers: the gain of a full pull by obdlab's own compression."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import zstandard

from obdlab.formats import oci
from obdlab.lab.baselines.overlayfs import Overlayfs
from obdlab.lab.images.ocilayout import OciLayout, push_layout
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from obdlab.lab.baselines.adapter import Source
    from obdlab.lab.testbed.containerd import OwnContainerd
    from obdlab.registry.client import RegistryClient

_CHUNK = 1 << 20
# The level of obdlab's ZFile blocks, and the default of BuildKit's zstd layers.
_LEVEL = 3


class OverlayfsZstd(Overlayfs):
    """containerd's overlayfs snapshotter; the image's layers are compressed by zstd in place of gzip."""

    name: ClassVar[str] = "overlayfs-zstd"
    title: ClassVar[str] = "a full pull of zstd layers with overlayfs"
    snapshotter: ClassVar[str] = "overlayfs"

    def tag(self, source: Source) -> str:
        """Return the tag of the image with zstd layers."""
        return f"{source.identity}-zstd{_LEVEL}"

    def publish(self, host: OwnContainerd, source: Source, client: RegistryClient, reference: str) -> None:
        """Compress the layers by zstd and push them."""
        image = OciLayout(source.layout)
        with tempfile.TemporaryDirectory(dir=source.layout.parent, prefix="zstd-") as directory:
            made = OciLayout.create(Path(directory, "layout"))
            config = made.add_document(oci.OCI_CONFIG, image.blob_path(image.manifest.config.digest).read_bytes())
            layers = [_compressed(image.blob_path(layer.digest), made) for layer in image.manifest.layers]
            made.finish(config, layers, source.recipe.name, host_platform())
            push_layout(made.root, client, Reference.parse(reference))


def _compressed(blob: Path, made: OciLayout) -> oci.Descriptor:
    file = made.root / "layer"
    with gzip.open(blob) as source, file.open("wb") as target, zstandard.open(target, "wb", _context()) as stream:
        shutil.copyfileobj(source, stream, _CHUNK)
    with file.open("rb") as stored:
        digest = "sha256:" + hashlib.file_digest(stored, "sha256").hexdigest()
    size = file.stat().st_size
    file.rename(made.blob_path(digest))
    return oci.Descriptor(oci.OCI_LAYER_ZSTD, digest, size)


def _context() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=_LEVEL)
