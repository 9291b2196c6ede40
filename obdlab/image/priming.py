"""Fetching the parts of remote layers that a start reads in any case into the cache, before the image is opened.

Opening reads the ends of blobs with their indexes; then come the hot layer, or the metadata of the file system, which
opening would begin to fetch. Fetched at the pull, they are there when a container is made.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from obdlab.call import Call
from obdlab.image.metadata import stream_metadata
from obdlab.image.open import OPEN_THREADS, stacked_lowers
from obdlab.image.remote import RemoteLayers
from obdlab.layers.budget import Budget
from obdlab.layers.ends import fetch_ends, fetch_rest_of_end
from obdlab.layers.lsmt import open_layer
from obdlab.traces.hotlayer import is_hot, stream_if_hot, stream_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from obdlab.cache.ahead.stream import StreamAhead
    from obdlab.image.config import ImageConfig, LowerConfig
    from obdlab.settings.settings import Settings

#: A larger hot layer is not fetched for a start that may never come.
MOST_AT_PULL = 64 << 20


def prime(config: ImageConfig, settings: Settings) -> None:
    """Fetch the ends of the image's remote layers. Cached parts are not fetched again.

    Fetches all layers even if some fail, within the settings' deadline of opening; then raises the first error.
    """
    lowers = list({lower.digest: lower for lower in stacked_lowers(config) if lower.digest}.values())
    if not lowers:
        return
    call = Call(time.monotonic() + settings.open_deadline_s)
    number = min(OPEN_THREADS, len(lowers))
    with (
        closing(RemoteLayers(config.repo_blob_url, settings, call=call)) as remote,
        ThreadPoolExecutor(number, "prime-end") as ends,
        ThreadPoolExecutor(number, "prime") as threads,  # after `ends`, as its threads give work to that
    ):
        for each in [threads.submit(_prime_one, lower, remote, ends) for lower in lowers]:
            each.result()


def _prime_one(lower: LowerConfig, remote: RemoteLayers, ends: Executor) -> None:
    with remote.open_layer(lower) as blob:
        _, end = fetch_ends(blob, remote.cache_unit, ends)
        fetch_rest_of_end(blob)
        if end is not None:
            end.result()


def prime_start(config: ImageConfig, settings: Settings) -> None:
    """Fetch the image's hot layer whole; without one, the metadata at the layers' fronts.

    Fetches nothing for an image with a trace, which knows better, and goes on for the settings' deadline of opening
    at most. Raises the error of a layer that cannot be opened.
    """
    if config.acceleration_layer or config.trace.digest or settings.trace_path:
        return
    remote_lowers = {lower.digest: lower for lower in config.lowers if lower.digest and not lower.is_turbo}
    lowers = [lower for lower in remote_lowers.values() if lower.local_file() is None]
    if not lowers:
        return
    call = Call(time.monotonic() + settings.open_deadline_s)
    with ExitStack() as opened:
        remote = opened.enter_context(closing(RemoteLayers(config.repo_blob_url, settings, call=call)))
        streams = _streams(lowers, remote, opened)
        try:
            for stream in streams:
                stream.wait(call.left_s(settings.open_deadline_s))
        finally:
            for stream in streams:
                stream.stop()


def _streams(lowers: Sequence[LowerConfig], remote: RemoteLayers, opened: ExitStack) -> list[StreamAhead]:
    hot = [lower for lower in lowers if lower.hot]
    if hot:  # no layer needs to be opened
        blobs = [opened.enter_context(remote.open_layer(lower)) for lower in hot if lower.size <= MOST_AT_PULL]
        return [stream for stream in map(stream_whole, blobs) if stream is not None]
    budget, layers = Budget(), []
    for lower in lowers:
        with ExitStack() as unused:
            layer = open_layer(unused.enter_context(remote.open_layer(lower)), budget=budget)
            unused.pop_all()
        layers.append(opened.enter_context(layer))
    if is_hot(layers[-1]):  # its manifest does not say so
        stream = stream_if_hot(layers[-1]) if lowers[-1].size <= MOST_AT_PULL else None
        return [] if stream is None else [stream]
    return stream_metadata(layers)
