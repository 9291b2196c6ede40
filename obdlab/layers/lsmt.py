"""One layer: an LSMT file as its index and the blob with its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from obdlab.blob import Blob, unwrapped
from obdlab.closing import Closing
from obdlab.errors import FormatError
from obdlab.formats.lsmt.index import SegmentIndex
from obdlab.formats.lsmt.layout import (
    HEADER_SPACE,
    MAGIC,
    RECORD_SIZE,
    Flags,
    Header,
    Segments,
    Trailer,
    check_sealed_segments,
    check_sealed_trailer,
    decode_segments,
    is_lsmt,
)
from obdlab.formats.zfile.layout import is_zfile
from obdlab.layers.budget import TablesTooLargeError
from obdlab.layers.tarwrap import open_tarwrap
from obdlab.layers.zfile import open_zfile

if TYPE_CHECKING:
    from obdlab.blob import Around
    from obdlab.layers.budget import Budget, Share

# Read from the end in one request: the trailer, and with it the index of a layer with up to 256 segments. No sealed
# file is smaller.
_TAIL_SIZE = 2 * HEADER_SPACE


class Layer(Protocol):
    """A layer as a stack or a commit needs it, sealed or writable."""

    @property
    def name(self) -> str:
        """Name of the layer in error messages."""

    @property
    def virtual_size(self) -> int:
        """Size of the disk in bytes as this layer declares it; 0 leaves it to the layers below."""

    @property
    def index(self) -> SegmentIndex:
        """The sectors the layer holds; every tag is 0."""

    @property
    def data(self) -> Blob:
        """The file that the index points into."""

    @property
    def uuid(self) -> str:
        """The layer's UUID, all zeros for a layer without one."""

    @property
    def parent_uuid(self) -> str:
        """UUID of the layer this one was made on."""

    def close(self) -> None:
        """Release the layer and its blobs."""


class LsmtLayer(Closing):
    """A sealed layer, committed or sealed in place, over the blob of its plain LSMT file.

    Opening reads the header and the tail, and the index in a third read if it does not lie within the last 8 KiB.
    Raises FormatError (blob, offset, got, wanted) if the file is cut short, is not a sealed LSMT file, or has an
    index that is unordered, points outside of the layer's data, or is larger than ``share`` (if given) allows.
    """

    def __init__(self, blob: Blob, share: Share | None = None) -> None:
        self.name = blob.name
        self.data = blob
        size = blob.size
        if size < _TAIL_SIZE:
            if size >= HEADER_SPACE:
                _refuse_writable(Header.from_bytes(blob.read_at(0, HEADER_SPACE), blob=blob.name), blob)
            raise FormatError(
                "sealed LSMT layer is cut short", blob=blob.name, got=f"{size} bytes", wanted=f"at least {_TAIL_SIZE}"
            )
        tail_offset = size - _TAIL_SIZE
        tail = memoryview(blob.read_at(tail_offset, _TAIL_SIZE))
        header = Header.from_bytes(blob.read_at(0, HEADER_SPACE), blob=blob.name)
        if not header.flags & Flags.DATA:
            raise FormatError(
                "LSMT file is not a data file", blob=blob.name, offset=28, got=f"flags {int(header.flags):#x}"
            )
        at = size - HEADER_SPACE
        if tail[at - tail_offset :][: len(MAGIC)] != MAGIC:
            _refuse_writable(header, blob)
        self.trailer = Trailer.from_bytes(bytes(tail[at - tail_offset :]), blob=blob.name, offset=at)
        check_sealed_trailer(self.trailer, size, blob=blob.name)
        #: True if a writable layer was sealed by appending to it; the header of a committed layer has the flag
        #: SEALED.
        self.sealed_in_place = not header.flags & Flags.SEALED
        if share is not None:
            share.take_segments(self.trailer.index_size, blob.name)
        self.index = SegmentIndex(self._read_segments(tail, tail_offset))

    def _read_segments(self, tail: memoryview, tail_offset: int) -> Segments:
        begin = self.trailer.index_offset
        end = begin + self.trailer.index_size * RECORD_SIZE
        if begin >= tail_offset:
            records: bytes | memoryview = tail[begin - tail_offset : end - tail_offset]
        else:
            records = self.data.read_at(begin, min(end, tail_offset) - begin) + tail[: max(0, end - tail_offset)]
        return self._checked(decode_segments(records), begin)

    def _checked(self, segments: Segments, index_offset: int) -> Segments:
        check_sealed_segments(segments, index_offset, blob=self.name)
        # A flattened layer keeps the tags of the layers it was made of; they have no meaning here.
        return segments.without_tags()

    def read_from(self, blob: Blob) -> None:
        """Read the layer's data from ``blob``, the same file, from now on."""
        self.data = blob

    @property
    def file(self) -> Blob:
        """The layer's plain LSMT file."""
        return self.data

    @property
    def virtual_size(self) -> int:
        """Size of the disk in bytes as this layer declares it; 0 leaves it to the layers below."""
        return self.trailer.virtual_size

    @property
    def uuid(self) -> str:
        """The layer's UUID, all zeros if it was committed without one."""
        return self.trailer.uuid

    @property
    def parent_uuid(self) -> str:
        """UUID of the layer this one was made on; advisory."""
        return self.trailer.parent_uuid

    @property
    def user_tag(self) -> str:
        """The commit message."""
        return self.trailer.user_tag.decode(errors="replace")

    def close(self) -> None:
        """Close the blob below."""
        self.data.close()


#: Makes a layer of its plain LSMT file and its share of the image's budget; raises as :class:`LsmtLayer` does.
Kind = Callable[[Blob, "Share | None"], LsmtLayer]


class RepeatedLayer(LsmtLayer):
    """A lower copy of a layer that the stack has again further up, where it hides everything shown here.

    The topmost copy owns the blob: closing this one does nothing.
    """

    def __init__(self, layer: LsmtLayer) -> None:
        self.name, self.data, self.trailer = layer.name, layer.data, layer.trailer
        self.sealed_in_place = layer.sealed_in_place
        self.index = SegmentIndex(Segments.from_rows([]))

    def close(self) -> None:
        """Leave the blob to the topmost layer."""


# Refuses a file without trailer whose header lacks the flag SEALED.
def _refuse_writable(header: Header, blob: Blob) -> None:
    if not header.flags & Flags.SEALED:
        raise FormatError("writable layer (not sealed): commit or seal it first", blob=blob.name)


def open_layer(
    blob: Blob,
    watched: Callable[[Blob], Blob] | None = None,
    budget: Budget | None = None,
    around: Around = unwrapped,
    kind: Kind = LsmtLayer,
) -> LsmtLayer:
    """Open a layer blob as stored: plain LSMT or ZFile, each with or without a tar around it.

    Opening reads the plain LSMT file through ``watched(file)``. The memory of its tables is taken from the image's
    ``budget``. ``around`` gets the joints "zfile" and "layer". ``kind`` makes the layer of the plain LSMT file.

    The blob then belongs to the layer, but stays the caller's if this raises: FormatError if it is no layer,
    malformed or too large, CorruptBlobError if a checksum is wrong.
    """
    share = budget.share() if budget is not None else None
    try:
        return _open_layer(blob, watched, share, around, kind)
    except TablesTooLargeError:
        # The image lists too much. Its blobs may be those of other images, which lose nothing by it.
        raise
    except FormatError:
        # Only headers identify a layer. If a cache below kept a wrong answer of its source, every opening would fail.
        # Read again without the cache, the source may give the right bytes.
        blob.evict(0, blob.size)
    return _open_layer(blob, watched, share, around, kind)


def _open_layer(
    blob: Blob, watched: Callable[[Blob], Blob] | None, share: Share | None, around: Around, kind: Kind
) -> LsmtLayer:
    content = open_tarwrap(blob)
    start = content.read_at(0, min(512, content.size))
    if is_zfile(start, blob=blob.name):
        content = around("zfile", open_zfile(content, share))
    elif not is_lsmt(start):
        raise FormatError(
            "neither a ZFile nor an LSMT layer",
            blob=blob.name,
            offset=0,
            got=start[:24].hex() or "nothing",
            wanted="a ZFile or LSMT header",
        )
    content = around("layer", content)
    if watched is None:
        return kind(content, share)
    layer = kind(watched(content), share)
    layer.read_from(content)
    return layer
