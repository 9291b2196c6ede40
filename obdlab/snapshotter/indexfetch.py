"""Fetching indexes of pulled layers in the background: the first container of an image finds them in the cache."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.image.config import ImageConfig

if TYPE_CHECKING:
    from obdlab.image.config import LowerConfig
    from obdlab.server.client import Devices

logger = logging.getLogger(__name__)

# Bounds the queue of a host that pulls faster than its registry answers; further layers are dropped.
_MOST_WAITING = 1024


class Priming:
    """Hands queued layers to ``devices``, in batches, from a thread that ends when the queue is empty."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._guard = threading.Lock()
        self._waiting: list[tuple[str, LowerConfig]] = []
        self._thread: threading.Thread | None = None

    def add(self, repo_blob_url: str, layer: LowerConfig) -> None:
        """Queue a layer whose index is to be fetched soon. Returns at once, and never fails."""
        with self._guard:
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append((repo_blob_url, layer))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prime", daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the queue is done. Return False on timeout."""
        with self._guard:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._guard:
                layers, self._waiting = self._waiting, []
                if not layers:
                    self._thread = None
                    return
            by_repository: dict[str, list[LowerConfig]] = defaultdict(list)
            for url, layer in layers:
                by_repository[url].append(layer)
            for url, lowers in by_repository.items():
                try:
                    self._devices.prime(ImageConfig(repo_blob_url=url, lowers=tuple(lowers)))
                except ObdlabError as error:  # opening the image reports it again if it matters
                    logger.info("indexes not fetched: %s", error)
