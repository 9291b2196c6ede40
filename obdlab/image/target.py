"""The target of a turboOCI layer: the ordinary layer whose uncompressed tar the layer's records point into."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.formats.compression import MAGIC_SIZE, compression_of
from obdlab.image.config import LowerConfig
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.zstdtarget import ZstdTarget
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    from obdlab.blob import Around, Blob
    from obdlab.image.remote import RemoteLayers
    from obdlab.layers.spancache import SpanCache


def open_target(
    lower: LowerConfig, remote: RemoteLayers | None, around: Around, spans: SpanCache
) -> tuple[Blob, str]:
    """Return the uncompressed tar of a lower's target, and the identity of the target.

    The target is the local ``target_file``, or else the blob ``target_digest`` of the image's repository, which
    ``remote`` opens. Decompressed spans are kept in ``spans``. ``around`` gets the joints "origin" (of a local file)
    and "target". Raises FormatError if the target does not fit the lower's gzip index, or is compressed and the lower
    names no index; SourceError if a file or the registry cannot be read.
    """
    if not lower.target_file and not lower.target_digest:
        raise FormatError("gzip index without a target", blob=lower.gzip_index, wanted="targetFile or targetDigest")
    blob, identity = _open_stored(lower, remote, around)
    try:
        blob = uncompressed_target(blob, lower.gzip_index, spans)
        if remote is not None and not lower.target_file and isinstance(blob, GzipTarget | ZstdTarget):
            blob = remote.cache_content(blob, lower.target_digest)
        return around("target", blob), identity
    except BaseException:
        blob.close()
        raise


def _open_stored(lower: LowerConfig, remote: RemoteLayers | None, around: Around) -> tuple[Blob, str]:
    if not lower.target_file:
        assert remote is not None
        # Without a hash tree: settings that require one refuse it.
        stored = LowerConfig(digest=lower.target_digest, size=lower.target_size)
        return remote.open_layer(stored), lower.target_digest
    file = LocalFile(lower.target_file)
    try:
        check_target_size(file, lower)
        return around("origin", file), file.identity()
    except BaseException:
        file.close()
        raise


def check_target_size(stored: Blob, lower: LowerConfig) -> None:
    """Raise FormatError if a target has another size than the layer's blob says."""
    if lower.target_size and stored.size != lower.target_size:
        raise FormatError(
            "target of a turboOCI layer has another size than its blob says",
            blob=stored.name,
            got=stored.size,
            wanted=lower.target_size,
        )


def uncompressed_target(blob: Blob, gzip_index: str, spans: SpanCache) -> Blob:
    """Return the content of a target's ``blob``, by the index file ``gzip_index`` if it is not empty.

    The blob then belongs to the result, unless this raises: FormatError, CorruptBlobError or SourceError.
    """
    compression = compression_of(blob.read_at(0, min(MAGIC_SIZE, blob.size)))
    if compression and not gzip_index:
        raise FormatError(
            "target of a turboOCI layer is compressed, and no index is named",
            blob=blob.name,
            got=compression,
            wanted="an uncompressed tar, or gzipIndex",
        )
    if not gzip_index:
        return blob
    index = LocalFile(gzip_index)
    try:
        if compression == "zstd":
            return ZstdTarget(blob, index, spans=spans)
        return GzipTarget(blob, index, spans=spans)
    except BaseException:
        index.close()
        raise
