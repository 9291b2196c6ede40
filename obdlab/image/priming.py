"""What opening an image needs of its remote layers, fetched into the cache before anybody opens it.

These are the ends of blobs with their indexes. Pulled with the manifest, they are there when a container is made.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from obdlab.image.ends import fetch_ends, fetch_rest_of_end
from obdlab.image.open import OPEN_THREADS, stacked_lowers
from obdlab.image.remote import RemoteLayers
from obdlab.registry.deadline import deadline_of_thread

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from obdlab.image.config import ImageConfig, LowerConfig
    from obdlab.image.settings import Settings


def prime(config: ImageConfig, settings: Settings) -> None:
    """Fetch the ends of the image's layers that are in a registry. What is there already is not fetched again.

    Raises the first error that reading some layer met, within the settings' deadline of opening; the others are
    fetched all the same.
    """
    lowers = list({lower.digest: lower for lower in stacked_lowers(config) if lower.digest}.values())
    if not lowers:
        return
    deadline = time.monotonic() + settings.open_deadline_s
    number = min(OPEN_THREADS, len(lowers))
    with (
        closing(RemoteLayers(config.repo_blob_url, settings)) as remote,
        ThreadPoolExecutor(number, "prime-end") as ends,
        ThreadPoolExecutor(number, "prime") as threads,  # ends first, as it gives work to the other
    ):
        for each in [threads.submit(_prime_one, lower, remote, ends, deadline) for lower in lowers]:
            each.result()


def _prime_one(lower: LowerConfig, remote: RemoteLayers, ends: Executor, deadline: float) -> None:
    with deadline_of_thread(deadline), remote.open(lower.digest, lower.size) as blob:
        _, end = fetch_ends(blob, remote.cache_unit, ends)
        fetch_rest_of_end(blob)
        if end is not None:
            end.result()
