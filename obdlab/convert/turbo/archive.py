"""The blob of a turboOCI layer: a small gzip-compressed tar with the layer's metadata files."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_BLOCK = 512
_READ = 1 << 20


@dataclass(frozen=True, slots=True)
class TurboBlob:
    """A finished blob: ``digest`` and ``size`` of the file, and the digest of its uncompressed tar."""

    digest: str
    size: int
    diff_id: str


def write_turbo_blob(path: Path, files: Mapping[str, Path]) -> TurboBlob:
    """Write a new blob with these files, by their names in it, in their order. Raises SourceError.

    The bytes depend on names and contents alone: owner, times and permissions are always the same.
    """
    digest = hashlib.sha256()
    try:
        with path.open("xb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
            for piece in _tar(files):
                digest.update(piece)
                packed.write(piece)
        size = path.stat().st_size
    except OSError as error:
        raise SourceError(f"cannot write the turboOCI layer: {error.strerror or error}", blob=str(path)) from error
    return TurboBlob(digest_of_file(path), size, f"sha256:{digest.hexdigest()}")


def _tar(files: Mapping[str, Path]) -> Iterator[bytes]:
    for name, path in files.items():
        with path.open("rb") as file:
            header = tarfile.TarInfo(name)
            header.size = path.stat().st_size
            yield header.tobuf(tarfile.USTAR_FORMAT)
            while piece := file.read(_READ):
                yield piece
            yield bytes(-header.size % _BLOCK)
    yield bytes(2 * _BLOCK)
