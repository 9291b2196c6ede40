"""Fetching the first reads of pulled images in the background: their first containers find them in the cache.

First come the indexes of each layer, which opening reads. When no further layer comes, the image is known whole: then
its hot layer, or else the metadata of its file system.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.image.config import ImageConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from obdlab.image.config import LowerConfig
    from obdlab.server.client import Devices

logger = logging.getLogger(__name__)

# Bounds the queue of a host that pulls faster than its registry answers; further layers are dropped.
_MOST_WAITING = 1024
# Images whose starts are fetched at a time; further ones are left to their servers.
_MOST_STARTS = 4


class Priming:
    """Hands queued images to ``devices``, in batches, from a thread that ends when the queue is empty."""

    def __init__(self, devices: Devices, is_started: Callable[[ImageConfig], bool] = lambda _: False) -> None:
        """``is_started`` returns True for an image with a device, which fetches the rest by itself."""
        self._devices = devices
        self._is_started = is_started
        self._guard = threading.Lock()
        self._waiting: list[ImageConfig] = []
        self._thread: threading.Thread | None = None
        self._starts: set[threading.Thread] = set()

    def add(self, image: ImageConfig) -> None:
        """Queue an image whose top layer was pulled. Returns at once, and never fails."""
        with self._guard:
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append(image)
            if self._thread is None:
                self._thread = _started(threading.Thread(target=self._run, name="prime", daemon=True))

    def wait(self, timeout_s: float) -> bool:
        """Wait until the queue is done, and all that was begun. Return False on timeout."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._guard:
                thread = self._thread or next(iter(self._starts), None)
            if thread is None:
                return True
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                return False

    def _run(self) -> None:
        pulled: list[ImageConfig] = []
        while True:
            with self._guard:
                images, self._waiting = self._waiting, []
                if not images and not pulled:
                    self._thread = None
                    return
            if images:
                self._fetch_indexes(images)
                pulled += images
            else:
                for image in _whole(pulled):
                    if not self._is_started(image):  # a second connection would only delay it
                        self._begin_start(image)
                pulled = []

    def _fetch_indexes(self, images: Iterable[ImageConfig]) -> None:
        by_repository: dict[str, list[LowerConfig]] = defaultdict(list)
        for image in images:
            if not image.acceleration_layer:
                by_repository[image.repo_blob_url].append(image.lowers[-1])
        for url, lowers in by_repository.items():
            self._prime(ImageConfig(repo_blob_url=url, lowers=tuple(lowers)))

    # A large hot layer on a slow link must not delay the indexes of other images.
    def _begin_start(self, image: ImageConfig) -> None:
        thread = threading.Thread(target=self._fetch_start, args=(image,), name="prime-start", daemon=True)
        with self._guard:
            if len(self._starts) < _MOST_STARTS and _started(thread) is not None:
                self._starts.add(thread)

    def _fetch_start(self, image: ImageConfig) -> None:
        try:
            self._prime(image, start=True)
        finally:
            with self._guard:
                self._starts.discard(threading.current_thread())

    def _prime(self, image: ImageConfig, *, start: bool = False) -> None:
        try:
            self._devices.prime(image, start=start)
        except (ObdlabError, OSError) as error:  # opening the image reports it again if it matters
            logger.info("not fetched ahead of the first start: %s", error)


# None if the system has no threads left at present: the next pull tries again.
def _started(thread: threading.Thread) -> threading.Thread | None:
    try:
        thread.start()
    except RuntimeError as error:
        logger.warning("nothing is fetched ahead of the first start: %s", error)
        return None
    return thread


# Leaves out images that others of them are made on: those of the lower layers of one pull.
def _whole(images: Iterable[ImageConfig]) -> list[ImageConfig]:
    whole: dict[str, ImageConfig] = {}
    for image in images:  # from the bottom up
        below = image.lowers[-2].dir if len(image.lowers) > 1 else ""
        whole.pop(below, None)
        whole[image.lowers[-1].dir] = image
    return list(whole.values())
