"""Description of an image, from its manifest, the beginnings of its layers and the block cache."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.turbo.targets import look_for_target, verify_target
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats import oci
from obdlab.formats.lsmt.layout import is_lsmt
from obdlab.formats.tar import parse_wrap
from obdlab.formats.zfile import Algorithm
from obdlab.formats.zfile.layout import HEADER_SIZE, ZFileHeader, is_zfile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from obdlab.cache.admin import CacheEntry
    from obdlab.convert.endpoints.endpoint import ImageSource
    from obdlab.convert.progress import Progress
    from obdlab.formats.oci import Descriptor, Manifest, Platform

OVERLAYBD, TURBO_OCI, PLAIN = "overlaybd", "turboOCI", "plain"
_MIXED = "mixed"
# Enough for the header of a ZFile behind the header of its tar.
_BEGINNING = 4096
_AT_ONCE = 8
_WRONG_TARGET = "not sound: the files of a layer cannot be read"
_COPY = 1 << 20
_PLAIN_COMPRESSION = {
    oci.OCI_LAYER_GZIP: "gzip",
    oci.DOCKER_LAYER_GZIP: "gzip",
    oci.OCI_LAYER_ZSTD: "zstd",
    oci.DOCKER_LAYER_ZSTD: "zstd",
}


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer, bottom first. Sizes in bytes.

    ``compression`` is an algorithm, "none", or "unknown" for a blob that is neither ZFile nor LSMT layer;
    ``block_size`` is a ZFile's, else 0. ``cached_size`` is None if the block cache does not keep such layers.
    """

    digest: str
    size: int
    media_type: str
    kind: str
    compression: str
    block_size: int
    hot: bool
    cached_size: int | None
    cached_verified: bool
    #: The root of the layer's hash tree, by which each unit that is read is checked; "" without a tree.
    hash_tree: str
    #: The digest of a turboOCI layer's sums, by which reads of its target are checked; "" without sums.
    tar_sums: str
    #: The digest of a turboOCI layer's target, its size as stored (0 if it is not there), and its fault.
    target: str
    target_size: int
    target_fault: str
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """An image of one platform. ``digest`` is its manifest's; ``platforms`` are all that its name offers.

    ``verified`` names the checks of its bytes. ``trace`` is the blob of a trace that refers to the image, or "".
    """

    name: str
    digest: str
    media_type: str
    kind: str
    platform: str
    platforms: tuple[str, ...]
    filesystem: str
    size: int
    cached_size: int | None
    hot_layer: bool
    trace: str
    trace_is_hot: bool
    verified: str
    config: str
    subject: str
    annotations: Mapping[str, str]
    layers: tuple[LayerFacts, ...] = field(default=())


def describe_image(source: ImageSource, platform: Platform, cached: Mapping[str, CacheEntry] | None) -> ImageFacts:
    """Describe an image. ``cached`` is the content of the block cache, by digest; None if it keeps no such source.

    The first 4 KiB of each overlaybd layer are read, and targets of turboOCI layers are looked for. Raises
    SourceError, FormatError or CorruptBlobError.
    """
    _, root = source.root()
    descriptor, manifest = source.find(platform, overlaybd=True)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        layers = tuple(pool.map(lambda layer: _layer(source, layer, cached), manifest.layers))
    kind = _kind(manifest)
    trace = source.trace(descriptor.digest) if kind == OVERLAYBD else None
    there = [layer.cached_size for layer in layers if layer.cached_size is not None]
    return ImageFacts(
        name=source.name,
        digest=descriptor.digest,
        media_type=manifest.media_type,
        kind=kind,
        platform=_platform_text(source.config(manifest).platform),
        platforms=_platforms(root),
        filesystem=_filesystem(manifest) if kind == OVERLAYBD else "",
        size=sum(layer.size for layer in layers),
        cached_size=sum(there) if there else None,
        hot_layer=bool(layers) and layers[-1].hot,
        trace="" if trace is None else trace.digest,
        trace_is_hot=trace is not None and oci.HOT_LAYER in trace.annotations,
        verified=_not_verified(layers),
        config=manifest.config.digest,
        subject="" if manifest.subject is None else manifest.subject.digest,
        annotations=manifest.annotations,
        layers=layers,
    )


def verify_image(source: ImageSource, facts: ImageFacts, platform: Platform, progress: Progress) -> ImageFacts:
    """Read every layer whole, and the targets of turboOCI layers, and return the facts with ``verified`` set.

    A wrong target is one of the facts. Raises CorruptBlobError if a layer does not match its size or digest,
    SourceError if it cannot be read.
    """
    _, manifest = source.find(platform, overlaybd=True)
    layers = []
    for number, (layer, described) in enumerate(zip(manifest.layers, facts.layers, strict=True)):
        fault = described.target_fault
        with tempfile.TemporaryDirectory(prefix="obdlab-inspect-", dir="/var/tmp") as directory:
            place = Path(directory)
            with progress.task(f"layer {number}", layer.size) as task:
                file = source.fetch(layer, place, task.advance)
            try:
                while file.read(_COPY):
                    pass
            finally:
                source.release(file)
            if layer.turbo_target is not None and not fault:
                with progress.task(f"layer {number}: target", described.target_size) as task:
                    fault = _fault_of_target(source, layer, place, task.advance)
        layers.append(replace(described, target_fault=fault))
    if any(layer.target_fault for layer in layers):
        return replace(facts, layers=tuple(layers), verified=_WRONG_TARGET)
    what = "every layer and target" if any(layer.target for layer in layers) else "every layer"
    return replace(facts, verified=f"verified: {what} was read whole and matches its digest")


def _fault_of_target(source: ImageSource, layer: Descriptor, place: Path, advance: Callable[[int], None]) -> str:
    try:
        verify_target(source, layer, place, advance)
    except ObdlabError as error:
        return str(error)
    return ""


def _layer(source: ImageSource, layer: Descriptor, cached: Mapping[str, CacheEntry] | None) -> LayerFacts:
    kind = _layer_kind(layer)
    compression, block_size = _PLAIN_COMPRESSION.get(layer.media_type, "none"), 0
    if kind == OVERLAYBD:
        compression, block_size = _compression(source, layer)
    entry = None if cached is None else cached.get(layer.digest)
    keeps = cached is not None and kind != PLAIN
    size, fault = (0, "") if layer.turbo_target is None else look_for_target(source, layer)
    return LayerFacts(
        digest=layer.digest,
        size=layer.size,
        media_type=layer.media_type,
        kind=kind,
        compression=compression,
        block_size=block_size,
        hot=layer.annotations.get(oci.HOT_LAYER) == "yes",
        cached_size=(0 if entry is None else entry.cached_bytes) if keeps else None,
        cached_verified=entry is not None and entry.verified,
        hash_tree=layer.annotations.get(oci.HASH_TREE, "").partition(",")[0],
        tar_sums=layer.annotations.get(oci.TAR_SUMS, ""),
        target=layer.turbo_target or "",
        target_size=size,
        target_fault=fault,
        annotations=layer.annotations,
    )


def _compression(source: ImageSource, layer: Descriptor) -> tuple[str, int]:
    with closing(source.open_blob(layer)) as blob:
        data = blob.read_at(0, min(_BEGINNING, blob.size))
        try:
            window = parse_wrap(data, blob=blob.name)
            content = data[0 if window is None else window.offset :]
            if is_zfile(content[:HEADER_SIZE], blob=blob.name):
                header = ZFileHeader.from_bytes(content[:HEADER_SIZE], blob=blob.name)
                return Algorithm(header.algorithm).label, header.block_size
        except (FormatError, ValueError):
            return "unknown", 0
    return ("none" if is_lsmt(content) else "unknown"), 0


def _layer_kind(layer: Descriptor) -> str:
    if layer.turbo_target is not None:
        return TURBO_OCI
    return OVERLAYBD if layer.is_overlaybd else PLAIN


def _kind(manifest: Manifest) -> str:
    kinds = {_layer_kind(layer) for layer in manifest.layers} or {PLAIN}
    return kinds.pop() if len(kinds) == 1 else _MIXED


# Without an annotation the original assumes ext4.
def _filesystem(manifest: Manifest) -> str:
    noted = {layer.annotations.get(oci.BLOB_FS_TYPE, "").partition(";")[0] for layer in manifest.layers} - {""}
    return " and ".join(sorted(noted)) or "ext4"


def _not_verified(layers: tuple[LayerFacts, ...]) -> str:
    if any(layer.target_fault for layer in layers):
        return _WRONG_TARGET
    lazy = [layer for layer in layers if layer.kind != PLAIN]
    if not lazy:
        return "not verified: a layer is checked against its digest when it is fetched"
    whole = sum(layer.cached_verified for layer in lazy)
    here = f"; {whole} of {len(lazy)} are here whole and matched their digest" if whole else ""
    trees = sum(bool(layer.hash_tree) for layer in lazy)
    if all(layer.tar_sums for layer in lazy):
        return f"sums: each piece of a layer's target is checked when it is read{here}"
    if all(layer.hash_tree or layer.tar_sums for layer in lazy):
        return f"hash trees: each unit of a layer is checked when it is read{here}"
    some = f"; {trees} of {len(lazy)} have hash trees, which check what is read" if trees else ""
    return f"not verified: layers are read in pieces, which their own CRCs check and no digest does{some}{here}"


def _platforms(root: Manifest | oci.Index) -> tuple[str, ...]:
    if not isinstance(root, oci.Index):
        return ()
    return tuple(_platform_text(entry.platform) for entry in root.manifests if entry.platform is not None)


def _platform_text(platform: Platform) -> str:
    return "/".join(part for part in (platform.os, platform.architecture, platform.variant) if part)
