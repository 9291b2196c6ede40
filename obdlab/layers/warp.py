"""A warp layer: file system metadata of its own, and contents in the tar of an ordinary layer (turboOCI)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.formats.lsmt.warp import check_warp_segments, in_one_file
from obdlab.layers.lsmt import LsmtLayer

if TYPE_CHECKING:
    from obdlab.blob import LinkSpeed
    from obdlab.call import Call
    from obdlab.formats.lsmt.layout import Segments
    from obdlab.layers.budget import Share


class WarpLayer(LsmtLayer):
    """A sealed warp layer over its ``target``, an uncompressed tar, and the ``blob`` of its plain LSMT file.

    Its index points into one file made of both (:class:`WarpFile`), so that a stack, a recorder and a commit see an
    ordinary layer. Opening reads nothing of the target. Raises as :class:`LsmtLayer`, and FormatError naming the
    target if it is shorter than the records need. The target belongs to the layer, as its file does, once it is open.
    ``partial(WarpLayer, target)`` is a kind for :func:`obdlab.layers.lsmt.open_layer`.
    """

    def __init__(self, target: Blob, blob: Blob, share: Share | None = None) -> None:
        self.target = target
        super().__init__(blob, share)
        self.read_from(blob)

    @property
    def file(self) -> Blob:
        return self.data.own if isinstance(self.data, WarpFile) else self.data

    def read_from(self, blob: Blob) -> None:
        self.data = WarpFile(blob, self.target)

    def _checked(self, segments: Segments, index_offset: int) -> Segments:
        checked = check_warp_segments(
            segments, index_offset, self.target.size, blob=self.name, target=self.target.name
        )
        return in_one_file(checked, target_offset(self.data) // SECTOR)


def target_offset(blob: Blob) -> int:
    """Return the place of the target in the one file that begins with ``blob``: the next whole sector."""
    return -(-blob.size // SECTOR) * SECTOR


def parts_of(data: Blob, begin: int, end: int) -> list[tuple[Blob, int, int]]:
    """Return the blobs that hold the bytes ``[begin, end)`` of a layer's data, each with its range.

    One for any layer but a warp layer, whose data is in two.
    """
    if not isinstance(data, WarpFile):
        return [(data, begin, end)]
    return [(part, first, stop) for part, first, stop in data.parts(begin, end) if part is not None]


class WarpFile(Blob):
    """A warp layer's own file, zeros up to a whole sector, and its target. Both are closed with it."""

    def __init__(self, own: Blob, target: Blob) -> None:
        self.name = own.name
        self.own, self.target = own, target
        #: Where the target begins.
        self.target_at = target_offset(own)

    @property
    def size(self) -> int:
        return self.target_at + self.target.size

    @property
    def link(self) -> LinkSpeed | None:
        return self.target.link or self.own.link

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        at = self.target_at
        if offset >= at:
            return self.target.read_at(offset - at, length, call)
        check_range(self, offset, length)
        if offset + length <= self.own.size:
            return self.own.read_at(offset, length, call)
        return b"".join(
            bytes(end - begin) if part is None else part.read_at(begin, end - begin, call)
            for part, begin, end in self.parts(offset, offset + length)
        )

    def parts(self, begin: int, end: int) -> list[tuple[Blob | None, int, int]]:
        """Return the blobs that hold the bytes ``[begin, end)``, each with its range; None for the zeros between.

        Empty parts are left out.
        """
        size, at = self.own.size, self.target_at
        pieces: list[tuple[Blob | None, int, int]] = [
            (self.own, min(begin, size), min(end, size)),
            (None, min(max(begin, size), at), min(max(end, size), at)),
            (self.target, max(begin, at) - at, max(end, at) - at),
        ]
        return [piece for piece in pieces if piece[1] < piece[2]]

    def statistics(self) -> dict[str, int]:
        total = dict(self.own.statistics())
        for name, count in self.target.statistics().items():
            total[name] = total.get(name, 0) + count
        return total

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        for part, begin, end in self.parts(offset, offset + length):
            if part is not None:
                part.evict(begin, end - begin)

    def close(self) -> None:
        self.own.close()
        self.target.close()
