"""Fetching the metadata of an image's file system when the image is opened, before any of it is read.

Layers that ``convert`` made have it at their front. The requests for all layers go out together, so that mounting and
walking the tree wait for one round trip, and not for one per block that they come to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.blob import find
from obdlab.cache.ahead.stream import StreamAhead
from obdlab.cache.cachedblob import CachedBlob
from obdlab.layers.front import MOST_FRONT, front_of
from obdlab.layers.lsmt import LsmtLayer, RepeatedLayer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from obdlab.layers.lsmt import Layer


def stream_metadata(layers: Iterable[Layer]) -> list[StreamAhead]:
    """Begin to fetch the fronts of the layers that are in a registry and have one; return the streams.

    All fronts of an image together take at most ``MOST_FRONT``; the topmost layers come first.
    """
    streams, left = [], MOST_FRONT
    for layer in reversed(list(layers)):
        if not isinstance(layer, LsmtLayer) or isinstance(layer, RepeatedLayer):
            continue
        blob = find(layer.data, CachedBlob)
        front = 0 if blob is None else front_of(layer, blob)
        if blob is not None and 0 < front <= left:
            left -= front
            streams.append(StreamAhead(blob.name, blob, stop=front))
    for stream in streams:
        stream.start()
    return streams
