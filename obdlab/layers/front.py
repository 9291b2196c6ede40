"""The front of a layer: the metadata of its file system, stored before all other data.

The sectors' places in the file are free (:mod:`obdlab.layers.ordering`), so one request fetches all that mounting and
walking the layer's part of the file system reads. The commit message says how much that is: any reader of layers
shows it, and none depends on it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from obdlab.blob import range_in
from obdlab.formats.lsmt.layout import HEADER_SPACE, SECTOR
from obdlab.layers.commit import commit
from obdlab.layers.ordering import data_first

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.blob import Blob
    from obdlab.layers.commit import Committed
    from obdlab.layers.lsmt import Layer, LsmtLayer
    from obdlab.layers.ordering import SectorRange
    from obdlab.layers.sink import Sink

_TAG = "obdlab: {} sectors of metadata first"
_TAGGED = re.compile(_TAG.format(r"([1-9]\d{0,11})"), re.ASCII)
#: Most bytes of a blob that its front may take. The metadata of a million files takes some 40 MB.
MOST_FRONT = 64 << 20


def commit_with_front(layer: Layer, sink: Sink, metadata: Sequence[SectorRange], *, uuid: str) -> Committed:
    """Commit ``layer`` as :func:`~obdlab.layers.commit.commit` does, with these sectors of the disk at its front.

    Sectors that the layer does not hold are left out; without any, it is an ordinary commit.
    """
    sectors = int(data_first(layer.index.segments(), metadata).mapped_sectors.sum())
    if not sectors:
        return commit(layer, sink, uuid=uuid)
    return commit(layer, sink, uuid=uuid, user_tag=_TAG.format(sectors), first=metadata)


def has_front(layer: LsmtLayer) -> bool:
    """Return True if the layer's commit message has the size of a front."""
    return _TAGGED.fullmatch(layer.user_tag.rstrip("\0")) is not None


def front_of(layer: LsmtLayer, blob: Blob) -> int:
    """Return how many bytes of ``blob``, a blob below the layer's data, its front takes from the beginning on.

    Returns 0 for a layer without a front, or if its size is larger than the layer's data or than :data:`MOST_FRONT`.
    """
    told = _TAGGED.fullmatch(layer.user_tag.rstrip("\0"))
    if told is None:
        return 0
    end = HEADER_SPACE + int(told[1]) * SECTOR
    if end > layer.trailer.index_offset:
        return 0
    _, stop = range_in(blob, layer.data, 0, end)
    return stop if stop <= MOST_FRONT else 0
