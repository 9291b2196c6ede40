"""The target of a turboOCI layer: the ordinary layer whose uncompressed tar the layer's records point into."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.errors import CorruptBlobError, FormatError, SourceError, causes
from obdlab.formats.compression import MAGIC_SIZE, compression_of
from obdlab.formats.gzipmember import MAX_HEADER
from obdlab.formats.zstdindex import MAGIC as ZSTD_MAGIC
from obdlab.image.config import LowerConfig
from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.spannedtarget import SpannedTarget
from obdlab.layers.summedtar import SummedTar
from obdlab.layers.zstdtarget import ZstdTarget
from obdlab.localfile import LocalFile
from obdlab.registry.errors import RegistryError

if TYPE_CHECKING:
    from obdlab.blob import Around, Blob
    from obdlab.image.remote import RemoteLayers
    from obdlab.layers.spancache import SpanCache

_NOT_FOUND = 404
_GONE = "this layer has the files of a turboOCI image, and must stay in its repository: was the source deleted?"


def open_target(
    lower: LowerConfig,
    remote: RemoteLayers | None,
    around: Around,
    spans: SpanCache,
    *,
    verify: bool = True,
) -> tuple[Blob, str]:
    """Return the uncompressed tar of a lower's target, and the identity of the target.

    The target is the local ``target_file``, or else the blob ``target_digest`` of the image's repository, which
    ``remote`` opens. Decompressed spans are kept in ``spans``. With ``verify`` content is checked by the lower's file
    of sums, if it names one. ``around`` gets the joints "origin" (of a local file) and "target". Raises FormatError
    if the target does not fit the lower's gzip index, or is compressed and the lower names no index; SourceError if a
    file or the registry cannot be read.
    """
    if not lower.target_file and not lower.target_digest:
        raise FormatError("gzip index without a target", blob=lower.gzip_index, wanted="targetFile or targetDigest")
    try:
        return _open_target(lower, remote, around, spans, verify=verify)
    except SourceError as error:
        if any(isinstance(each, RegistryError) and each.status == _NOT_FOUND for each in causes(error)):
            raise SourceError(f"{error}; {_GONE}") from error
        raise


def _open_target(
    lower: LowerConfig, remote: RemoteLayers | None, around: Around, spans: SpanCache, *, verify: bool
) -> tuple[Blob, str]:
    checked = verify and bool(lower.tar_sums)
    blob, identity = _open_stored(lower, remote, around, checked=checked)
    try:
        cache = remote if remote is not None and not lower.target_file and remote.keeps_content else None
        # Images without sums share the content that is kept.
        blob = uncompressed_target(blob, lower.gzip_index, spans, checked_above=checked and cache is None)
        if cache is not None and isinstance(blob, SpannedTarget):
            blob = cache.cache_content(blob, lower.target_digest)
        if verify:
            blob = summed(blob, lower, spans)
        return around("target", blob), identity
    except BaseException:
        blob.close()
        raise


def summed(tar: Blob, lower: LowerConfig, spans: SpanCache) -> Blob:
    """Return the content of a target, checked by the lower's file of sums; unchanged if the lower names none.

    The tar then belongs to the result, unless this raises: FormatError or SourceError.
    """
    if not lower.tar_sums:
        return tar
    sums = LocalFile(lower.tar_sums)
    try:
        return SummedTar(tar, sums, spans)
    except BaseException:
        sums.close()
        raise


def _open_stored(
    lower: LowerConfig, remote: RemoteLayers | None, around: Around, *, checked: bool
) -> tuple[Blob, str]:
    if not lower.target_file:
        assert remote is not None
        blob = remote.open_target(lower.target_digest, lower.target_size, checked_above=checked)
        return blob, lower.target_digest
    file = LocalFile(lower.target_file)
    try:
        check_target_size(file.name, file.size, lower)
        return around("origin", file), file.identity()
    except BaseException:
        file.close()
        raise


def check_target_size(name: str, size: int, lower: LowerConfig) -> None:
    """Raise FormatError naming the target if its stored bytes are not as many as the layer's blob says."""
    if lower.target_size and size != lower.target_size:
        raise FormatError(
            "target of a turboOCI layer has another size than its blob says",
            blob=name,
            got=size,
            wanted=lower.target_size,
        )


def uncompressed_target(blob: Blob, gzip_index: str, spans: SpanCache, *, checked_above: bool = False) -> Blob:
    """Return the content of a target's ``blob``, by the index file ``gzip_index`` if it is not empty.

    ``checked_above``: as :class:`obdlab.layers.spannedtarget.SpannedTarget` has it. If the beginning of the blob is
    wrong, it is read once more past caches and mirrors. The blob then belongs to the result, unless this raises:
    FormatError, CorruptBlobError or SourceError.
    """
    try:
        return _decoded(blob, gzip_index, spans, checked_above=checked_above)
    except (FormatError, CorruptBlobError):
        blob.evict(0, min(MAX_HEADER, blob.size))
    return _decoded(blob, gzip_index, spans, checked_above=checked_above)


def _decoded(blob: Blob, name: str, spans: SpanCache, *, checked_above: bool) -> Blob:
    if not name:
        compression = compression_of(blob.read_at(0, min(MAGIC_SIZE, blob.size)))
        if compression:
            raise FormatError(
                "target of a turboOCI layer is compressed, and no index is named",
                blob=blob.name,
                got=compression,
                wanted="an uncompressed tar, or gzipIndex",
            )
        return blob
    index = LocalFile(name)
    try:
        # The index decides: it is of the image's manifest, the first bytes of the target may be forged.
        is_zstd = index.read_at(0, min(len(ZSTD_MAGIC), index.size)) == ZSTD_MAGIC
        return (ZstdTarget if is_zstd else GzipTarget)(blob, index, spans=spans, checked_above=checked_above)
    except BaseException:
        index.close()
        raise
