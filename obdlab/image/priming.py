"""Fetching the parts of remote layers that opening reads into the cache, before the image is opened.

These are the ends of blobs with their indexes. Fetched at the pull, they are there when a container is made.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from obdlab.call import Call
from obdlab.image.open import OPEN_THREADS, stacked_lowers
from obdlab.image.remote import RemoteLayers
from obdlab.layers.ends import fetch_ends, fetch_rest_of_end

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from obdlab.image.config import ImageConfig, LowerConfig
    from obdlab.settings.settings import Settings


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
