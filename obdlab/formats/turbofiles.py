"""The files in a turboOCI layer's blob: their names, and the one that names the layer's target.

That one is ours, and the original ignores it. Layers are shared by the digest of their blob, which does not cover the
annotation that names the target. With this file it covers the target, too.
"""

from __future__ import annotations

from typing import NamedTuple

from obdlab.errors import FormatError
from obdlab.formats.decimal import decimal
from obdlab.formats.oci import check_digest

#: The empty file that marks the blob.
MARKER = ".turbo.ociv1"
#: The index of the target, if that is gzip-compressed.
GZIP_INDEX = "gzip.meta"
#: The index of the target, if that is zstd-compressed. The original knows no such targets.
ZSTD_INDEX = "zstd.meta"
#: Names of indexes, by the compression of the target.
INDEXES = {"gzip": GZIP_INDEX, "zstd": ZSTD_INDEX}
#: Names the target (:class:`NamedTarget`).
TARGET_FILE = ".turbo.target"
#: Digests of the pieces of the target's content (:mod:`obdlab.formats.tarsums`). The original ignores the file.
SUMS_FILE = "tar.sums"
#: Bound on the size of the file that names the target.
MAX_TARGET_FILE = 128


def meta_name(filesystem: str, compression: str = "") -> str:
    """Return the name of the file with the metadata of a file system ("ext4", "erofs").

    The original reads zstd targets as if they were plain tars: it must not find metadata of these by its own name.
    """
    return f"{filesystem}.zstd.meta" if compression == "zstd" else f"{filesystem}.fs.meta"


def filesystem_of(name: str) -> str:
    """Return the file system of a file of metadata."""
    return name.partition(".")[0]


class NamedTarget(NamedTuple):
    """The ordinary layer that holds a turboOCI layer's files: its digest, and its size as stored."""

    digest: str
    size: int

    @classmethod
    def parse(cls, data: bytes, blob: str) -> NamedTarget:
        """Read ``<digest>,<size>`` and a line's end. Raises FormatError naming ``blob``."""
        text = data.decode("ascii", "replace")
        digest, _, rest = text.partition(",")
        size = decimal(rest.removesuffix("\n"))
        if size is None or not rest.endswith("\n"):
            raise FormatError(f"{TARGET_FILE}: not a target", blob=blob, got=text[:80], wanted="<digest>,<size>")
        return cls(check_digest(digest, blob), size)

    def to_bytes(self) -> bytes:
        """Return the contents of the file."""
        return f"{self.digest},{self.size}\n".encode()
