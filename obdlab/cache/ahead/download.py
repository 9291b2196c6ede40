"""Completing an image: its blobs are fetched whole into the block cache, in the spare time of the link.

:mod:`obdlab.cache.policy` decides what is requested when. The cache is the store: bytes that readers fetched are not
fetched again, an interrupted download continues where it was, and nothing is switched at the end: readers just find
more and more of the blob in the cache. A complete blob is checked against its digest and marked as verified; one that
does not match is dropped and fetched again.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from obdlab.cache.fetchpool import FetchPool
from obdlab.cache.policy import LARGEST_PIECE, Part, Situation, Step, Why, most_likely, next_step, speed
from obdlab.errors import ObdlabError, SourceError
from obdlab.system.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from obdlab.cache.ahead.allowance import Allowance
    from obdlab.cache.cachedblob import CachedBlob

logger = logging.getLogger(__name__)

# Interval at which a waiting download checks if its image was closed.
_LOOK_S = 0.2
# Pause for a blob that another process downloads, or that failed.
_LATER_S = 1.0
# Until the cache is asked again for room that it did not have.
_ROOM_LOOK_S = 60.0
# The most that one try fetches though the cache keeps nothing: it is full, or its file system read-only.
_MOST_LOST = 16 << 20
# Time over which the rate is measured that all pieces together achieve.
_MEASURED_S = 0.25

# Each thread's piece takes at most 1 MiB of memory.
_pool = FetchPool(threads=8, queued=64)


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """Timing and rate. The start is delayed by ``delay_s`` plus a random part of ``delay_extra_s``."""

    delay_s: float = 300.0
    delay_extra_s: float = 30.0
    bytes_per_s: float = 100 << 20  # 0: no limit
    tries: int = 5
    #: True if a fast link is used from the first moment on.
    at_once: bool = False
    #: The bytes of this day; None: no limit.
    allowance: Allowance | None = None
    #: True if the link is metered, which ends the download.
    metered: Callable[[], bool] | None = None
    #: Makes room in the cache for so many bytes, and returns how many may be stored. None: fetch without asking.
    room: Callable[[int], int] | None = None


class _ClosedError(Exception):
    """The image was closed, or must not be completed, so the download ends."""


@dataclass(slots=True)
class _Waiting:
    number: int  # its layer's, from the bottom up
    blob: CachedBlob
    tries: int
    not_before: float = 0.0


class BackgroundDownload:
    """Downloads the blobs of one image, one at a time, in its own thread, which ends when they are closed."""

    def __init__(self, blobs: Sequence[CachedBlob], options: DownloadOptions) -> None:
        self._options = options
        self._blobs = blobs
        self._not_before = 0.0
        self._begins = 0.0
        self._told: set[Why] = set()
        self._thread = threading.Thread(target=self._run, name="obdlab-download", daemon=True)
        # The pieces under way.
        self._change = threading.Condition()
        self._under_way = 0
        self._error: ObdlabError | None = None
        # The rate that they achieve: since when, and how many bytes.
        self._achieved = 0.0
        self._since = 0.0
        self._came = 0

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
            if self._options.allowance is not None:
                self._options.allowance.give_back()
            for blob in held:
                blob.let_go()

    def _download_all(self, blobs: Sequence[CachedBlob]) -> None:
        waiting = [_Waiting(number, blob, self._options.tries) for number, blob in enumerate(blobs)]
        now = time.monotonic()
        self._begins = now + self._options.delay_s + random.uniform(0, self._options.delay_extra_s)
        while waiting:
            one = self._next_of(waiting)
            self._sleep(one.blob, one.not_before - time.monotonic())
            if not one.blob.verified:
                self._wait_for_turn(one.blob)
                self._wait_for_room(one.blob, waiting)
            with _sole_downloader(one.blob) as mine:
                if one.blob.verified:
                    waiting.remove(one)
                    continue
                if mine:
                    one.tries -= 1
                    if self._download(one.blob):
                        logger.info("%s: downloaded and verified", one.blob.name)
                        waiting.remove(one)
                        continue
            one.not_before = time.monotonic() + _LATER_S
            if one.tries <= 0:
                logger.warning("%s: background download given up", one.blob.name)
                waiting.remove(one)

    # Blobs that failed or that another process downloads wait for the others.
    def _next_of(self, waiting: Sequence[_Waiting]) -> _Waiting:
        now = time.monotonic()
        ready = [one for one in waiting if one.not_before <= now]
        if not ready:
            return min(waiting, key=lambda one: one.not_before)
        return ready[most_likely([Part(one.blob.size, one.blob.counters.demand_bytes) for one in ready])]

    # Nothing is locked against other processes while it is too early, or there is nothing to spend.
    def _wait_for_turn(self, blob: CachedBlob) -> None:
        while (step := self._decide(blob, 1)).why not in (Why.FETCH, Why.RATE):
            self._pause(blob, step)

    # For the rest of the image: one that is never whole costs the registry its bytes, and its reader still a server.
    def _wait_for_room(self, blob: CachedBlob, waiting: Sequence[_Waiting]) -> None:
        while self._options.room is not None:
            wanted = sum(one.blob.missing_bytes() for one in waiting)
            try:
                room = self._options.room(wanted)
            except OSError as error:
                logger.info("%s: cannot see how much room the cache has: %s", blob.name, error)
                return
            if room >= wanted:
                return
            self._say(blob, Why.ROOM)
            self._sleep(blob, _ROOM_LOOK_S)

    def _download(self, blob: CachedBlob) -> bool:
        # Returns True if the blob is complete and verified now.
        try:
            self._fetch_all_of(blob)
        except ObdlabError as error:
            logger.info("%s: background download interrupted: %s", blob.name, error)
            return False
        if blob.missing_piece(0) is not None:
            logger.info("%s: background download: the cache did not keep all of it", blob.name)
            return False
        return blob.verify()

    def _fetch_all_of(self, blob: CachedBlob) -> None:
        unit = 0
        lost = blob.counters.uncached_bytes
        try:
            while (run := blob.missing_piece(unit, LARGEST_PIECE)) is not None and self._error is None:
                if blob.counters.uncached_bytes - lost > _MOST_LOST:
                    raise SourceError("the cache keeps nothing at present", blob=blob.name)
                first, stop = run
                step = self._decide(blob, blob.length_of(first, stop))
                if step.why is not Why.FETCH:
                    self._pause(blob, step)
                    continue
                unit = min(stop, first + max(1, step.length // blob.unit))
                self._request(blob, first, unit)
        finally:
            self._drain()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _decide(self, blob: CachedBlob, left: int) -> Step:
        options, now = self._options, time.monotonic()
        wait_s, rate = speed(blob.below.link, self._achieved)
        step = next_step(
            Situation(
                left=left,
                under_way=self._under_way,
                wait_s=wait_s,
                rate=rate,
                quiet_s=blob.quiet_s(),
                announced=blob.demand.announced.busy,
                early_s=self._begins - now,
                at_once=options.at_once,
                limited_s=self._not_before - now,
                allowed=float("inf") if options.allowance is None else options.allowance.left(left),
                metered=options.metered is not None and options.metered(),
            )
        )
        if step.why in (Why.METERED, Why.BUDGET):
            self._say(blob, step.why)
        if step.why is Why.METERED:
            raise _ClosedError
        return step

    # Once for each reason.
    def _say(self, blob: CachedBlob, why: Why) -> None:
        if why not in self._told:
            self._told.add(why)
            level = logging.WARNING if why is Why.ROOM else logging.INFO
            logger.log(level, "%s: not completed now: %s", blob.name, why.value)

    def _request(self, blob: CachedBlob, first: int, stop: int) -> None:
        length = blob.length_of(first, stop)
        if self._options.bytes_per_s:
            now = time.monotonic()
            self._not_before = max(self._not_before, now) + length / self._options.bytes_per_s
        if self._options.allowance is not None:
            self._options.allowance.spend(length)
        with self._change:
            if not self._under_way:
                self._since, self._came = time.monotonic(), 0
            self._under_way += length
        if not _pool.submit(partial(self._fetch, blob, first, stop, length)):
            self._fetch(blob, first, stop, length)

    def _fetch(self, blob: CachedBlob, first: int, stop: int, length: int) -> None:
        error: ObdlabError | None = None
        try:
            blob.fetch_in_background(first, stop)
        except ObdlabError as failed:
            error = failed
        finally:
            with self._change:
                self._error = self._error or error
                self._under_way -= length
                self._measure(0 if error else length)
                self._change.notify_all()

    # Pieces that share the link each look slower than it is; together they show its rate.
    def _measure(self, length: int) -> None:
        now = time.monotonic()
        self._came += length
        if now - self._since >= _MEASURED_S:
            self._achieved = self._came / (now - self._since)
            self._since, self._came = now, 0

    def _drain(self) -> None:
        with self._change:
            while self._under_way:
                self._change.wait(_LOOK_S)

    def _pause(self, blob: CachedBlob, step: Step) -> None:
        if step.why is not Why.ENOUGH:
            self._sleep(blob, step.pause_s)
            return
        with self._change:
            if self._under_way:
                self._change.wait(min(step.pause_s, _LOOK_S))
        self._sleep(blob, 0)

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
