"""Fetching blobs whole into the block cache, while no reader waits for anything else.

The cache is the store: bytes that readers fetched are not fetched again, an interrupted download continues where it
was, and nothing is switched at the end: readers just find more and more of the blob in the cache. A complete blob is
checked against its digest and marked as verified; one that does not match is dropped and fetched again.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.system.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.cache.cachedblob import CachedBlob

logger = logging.getLogger(__name__)

# Interval at which a waiting download checks if its image was closed.
_LOOK_S = 0.2
# A reader that has just waited for the origin is likely to do so again at once.
_QUIET_S = 0.05
# Pause for a blob that another process downloads, or that failed.
_LATER_S = 1.0


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """Timing and rate. The start is delayed by ``delay_s`` plus a random part of ``delay_extra_s``."""

    delay_s: float = 300.0
    delay_extra_s: float = 30.0
    bytes_per_s: float = 100 << 20  # 0: no limit
    tries: int = 5


class _ClosedError(Exception):
    """The image was closed, so the download ends."""


class BackgroundDownload:
    """Downloads the blobs of one image, one at a time, in its own thread, which ends when they are closed."""

    def __init__(self, blobs: Sequence[CachedBlob], options: DownloadOptions) -> None:
        self._options = options
        self._blobs = blobs
        self._not_before = 0.0
        self._thread = threading.Thread(target=self._run, name="obdlab-download", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end. Return False on timeout."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        held = [blob for blob in self._blobs if blob.hold()]
        try:
            self._download_all(held)
        except _ClosedError:
            pass
        except Exception:
            logger.exception("background download failed unexpectedly")
        finally:
            for blob in held:
                blob.let_go()

    def _download_all(self, blobs: Sequence[CachedBlob]) -> None:
        waiting = deque((blob, self._options.tries) for blob in blobs)
        if waiting:
            self._sleep(blobs[0], self._options.delay_s + random.uniform(0, self._options.delay_extra_s))
        while waiting:
            blob, tries = waiting.popleft()
            with _sole_downloader(blob) as mine:
                if blob.verified:
                    continue
                if mine:
                    tries -= 1
                    if self._download(blob):
                        logger.info("%s: downloaded and verified", blob.name)
                        continue
            if tries > 0:
                waiting.append((blob, tries))
                self._sleep(blob, _LATER_S)
            else:
                logger.warning("%s: background download given up", blob.name)

    def _download(self, blob: CachedBlob) -> bool:
        # Returns True if the blob is complete and verified now.
        try:
            unit = 0
            while (piece := blob.missing_piece(unit)) is not None:
                first, unit = piece
                self._yield_to_readers(blob)
                self._wait_for_rate(blob, first, unit)
                blob.fetch_in_background(first, unit)
        except ObdlabError as error:
            logger.info("%s: background download interrupted: %s", blob.name, error)
            return False
        if blob.missing_piece(0) is not None:
            logger.info("%s: background download: the cache did not keep all of it", blob.name)
            return False
        return blob.verify()

    def _yield_to_readers(self, blob: CachedBlob) -> None:
        while (pause_s := _QUIET_S - blob.quiet_s()) > 0:
            self._sleep(blob, pause_s)

    def _wait_for_rate(self, blob: CachedBlob, first: int, stop: int) -> None:
        now = time.monotonic()
        self._sleep(blob, self._not_before - now)
        if self._options.bytes_per_s:
            length = blob.length_of(first, stop)
            self._not_before = max(self._not_before, now) + length / self._options.bytes_per_s

    def _sleep(self, blob: CachedBlob, duration_s: float) -> None:
        end = time.monotonic() + duration_s
        while not blob.closed:
            left_s = end - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(left_s, _LOOK_S))
        raise _ClosedError


@contextmanager
def _sole_downloader(blob: CachedBlob) -> Iterator[bool]:
    # Between processes: no blob is to be downloaded twice. Yields True if this process is the one.
    try:
        fd = os.open(blob.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # deleted by hand
        yield False
        return
    try:
        yield try_lock(fd)
    finally:
        os.close(fd)
