"""The files in the blob of a turboOCI layer, unpacked: so that an image opens without a client that did it."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from typing import IO, TYPE_CHECKING, Protocol, cast

from obdlab.errors import FormatError, SourceError
from obdlab.image.config import LowerConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from obdlab.formats.oci import Descriptor

#: File systems whose metadata a blob may have, in the order of preference: every kernel has the first.
FILE_SYSTEMS = ("ext4", "erofs")
GZIP_INDEX = "gzip.meta"
_META = ".fs.meta"
_NAMES = (*(f"{name}{_META}" for name in FILE_SYSTEMS), GZIP_INDEX)
# The metadata of a layer of 100 GB: an index of 100,000 windows of 32 KiB, and as much for the file system.
_MOST_UNPACKED = 8 << 30
_COPY = 1 << 20
_DAMAGE = (tarfile.TarError, zlib.error, EOFError, ValueError, OverflowError)


class Readable(Protocol):
    """A file read from start to end, which checks its digest at the end."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, b"" at the end."""


def unpack(stream: Readable, place: Path, *, blob: str) -> None:
    """Write the known files of the blob read from ``stream`` into the new directory ``place``.

    Other members are ignored, the marker among them. Raises FormatError naming ``blob`` if it is no such blob or too
    large, SourceError if a file cannot be written; errors of the stream pass through. Then there is no directory.
    """
    try:
        place.mkdir(parents=True)
        _unpack(stream, place, blob)
        while stream.read(_COPY):  # to the end, where the digest is checked
            pass
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError):
            raise SourceError(f"cannot unpack the blob: {error.strerror or error}", blob=str(place)) from error
        raise


def _unpack(stream: Readable, place: Path, blob: str) -> None:
    left = _MOST_UNPACKED
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|gz") as tar:
            for member in tar:
                if member.name not in _NAMES or not member.isreg():
                    continue
                left -= member.size
                if left < 0:
                    raise FormatError("blob of a turboOCI layer is too large", blob=blob, wanted=_MOST_UNPACKED)
                content = tar.extractfile(member)
                assert content is not None
                with (place / member.name).open("xb") as file:
                    while data := content.read(_COPY):
                        file.write(data)
    except _DAMAGE as error:
        raise FormatError(f"not the blob of a turboOCI layer: {error}", blob=blob) from error
    except FileExistsError as error:
        raise FormatError("blob of a turboOCI layer has a file twice", blob=blob) from error


def file_system_of(places: Sequence[Path], name: str) -> str:
    """Return the file system whose metadata all blobs of an image have. Raises FormatError naming the image."""
    for file_system in FILE_SYSTEMS:
        if all((place / f"{file_system}{_META}").is_file() for place in places):
            return file_system
    raise FormatError("turboOCI layers have no file system in common", blob=name, wanted=" or ".join(FILE_SYSTEMS))


def lower_of(layer: Descriptor, place: Path, file_system: str) -> LowerConfig:
    """Return the lower of a turboOCI layer unpacked in ``place``; its target is a blob beside it."""
    index = place / GZIP_INDEX
    return LowerConfig(
        file=str(place / f"{file_system}{_META}"),
        target_digest=layer.turbo_target or "",
        gzip_index=str(index) if index.is_file() else "",
    )
