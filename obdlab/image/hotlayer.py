"""Hot layers: what a start reads, once more, as one small layer on top, laid out in the order of use.

Read from there the disk is the same. Fetching the layer is one request, and what it brings comes in time for whoever
reads it; whoever does not know it for what it is reads it like any other layer.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.image.replay import cached_blob_of, reads_in
from obdlab.image.tracemap import sectors_of_reads
from obdlab.layers.commit import commit
from obdlab.layers.lsmt import LsmtLayer
from obdlab.sources.streamahead import StreamAhead

if TYPE_CHECKING:
    from obdlab.layers.commit import Committed
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.sink import Sink
    from obdlab.layers.stack import Stack

logger = logging.getLogger(__name__)

#: What the layer's commit message says, by which it is known.
TAG = "obdlab: hot layer"
# One that is larger is nothing to fetch whole before a start.
_LARGEST = 1 << 30


class NothingHotError(ObdlabError):
    """A trace names nothing that the image has."""


def write_hot_layer(disk: Stack, trace: bytes, sink: Sink, *, name: str = "trace") -> Committed:
    """Write to ``sink`` the LSMT layer of what the trace or priority list names of the disk.

    Raises FormatError or CorruptBlobError for a trace that is damaged or of another image, NothingHotError if nothing
    of it is data of the disk, and what reading the disk raises.
    """
    sectors = sectors_of_reads(reads_in(trace, disk, name=name), disk)
    if not sectors:
        raise NothingHotError(f"{name}: names nothing of this image")
    top = disk.layers[-1]
    parent_uuid = top.uuid if isinstance(top, LsmtLayer) else ""
    return commit(disk, sink, parent_uuid=parent_uuid, user_tag=TAG, first=sectors, only_first=True)


def is_hot(layer: Layer) -> bool:
    """Whether the layer was made by :func:`write_hot_layer`."""
    return isinstance(layer, LsmtLayer) and layer.user_tag == TAG


def stream_if_hot(layer: LsmtLayer) -> StreamAhead | None:
    """If it is a hot layer in a registry, begin to fetch all of it; return what does."""
    if not is_hot(layer):
        return None
    blob = cached_blob_of(layer.data)
    if blob is None:
        return None
    if blob.size > _LARGEST:
        logger.warning("%s: not fetched ahead (got %d bytes, wanted at most %d)", layer.name, blob.size, _LARGEST)
        return None
    stream = StreamAhead(layer.name, blob)
    stream.start()
    return stream
