"""Fetching the reads of a trace into the block cache, ahead of the readers, in few large requests.

The order is roughly that of first use: units within the next few hundred KiB to MiB are sorted, and adjacent ones
become one request. These batches begin small, since the first reader comes at once, and grow. Readers that miss units
outside of the trace get the network for themselves, as soon as the requests in flight here have ended.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from obdlab.cache.policy import ANNOUNCED_REQUESTS, LARGEST_ANNOUNCED, may_announce
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from obdlab.cache.cachedblob import CachedBlob

logger = logging.getLogger(__name__)

#: (blob's number, first byte, end) in the order of use.
Range = tuple[int, int, int]

_FIRST_BATCH, _LARGEST_BATCH = 1 << 20, 8 << 20
# Units between two pieces are fetched too, which saves a request: the smallest gaps first, up to this share of a
# batch.
_GAP_SHARE = 0.08
_MOST_GAP = 512 << 10
_LOOK_S = 0.002
_FAILURES = 3
# If this many reads, and more than are in the trace, are not in it, it is taken to be another program's.
_MOST_SURPRISES = 8
# Planning ends after so many units, those that come again included: each record of a hostile trace may name a whole
# layer. 100,000 reads of a turboOCI layer, each of a span of 64 units, are a tenth of it.
_MOST_UNITS = 1 << 26


@dataclass(frozen=True, slots=True)
class Piece:
    """Units ``[first, stop)`` of a blob, for one request."""

    blob: int
    first: int
    stop: int


def plan(ranges: Iterable[Range], units: Sequence[int]) -> Iterator[Piece]:
    """Turn ranges into pieces; ``units`` has the bytes of a unit of each blob."""
    seen = [bytearray() for _ in units]  # a byte for each unit, 1 for those in the plan
    batch: list[tuple[int, int]] = []
    size, limit = 0, _FIRST_BATCH
    for blob, begin, end in ranges:
        unit_size, known = units[blob], seen[blob]
        first, stop = begin // unit_size, -(-end // unit_size)
        known.extend(bytes(max(0, stop - len(known))))
        while (unit := known.find(0, first, stop)) >= 0:
            known[unit] = 1
            first = unit + 1
            batch.append((blob, unit))
            size += unit_size
            if size >= limit:
                yield from _pieces(batch, units, seen)
                batch, size, limit = [], 0, min(2 * limit, _LARGEST_BATCH)
    yield from _pieces(batch, units, seen)


def _pieces(batch: list[tuple[int, int]], units: Sequence[int], seen: Sequence[bytearray]) -> list[Piece]:
    first_use = {place: number for number, place in enumerate(batch)}
    batch = sorted(batch)
    bridged = _gaps_to_bridge(batch, units)
    runs: list[list[int]] = []  # blob, first, stop, number of first use
    for blob, unit in batch:
        number = first_use[blob, unit]
        last = runs[-1] if runs else None
        follows = last is not None and last[0] == blob and (unit == last[2] or (blob, unit) in bridged)
        if last is not None and follows and unit < last[1] + max(1, LARGEST_ANNOUNCED // units[blob]):
            seen[blob][last[2] : unit] = b"\1" * (unit - last[2])
            last[2], last[3] = unit + 1, min(last[3], number)
        else:
            runs.append([blob, unit, unit + 1, number])
    runs.sort(key=lambda run: run[3])
    return [Piece(blob, first, stop) for blob, first, stop, _ in runs]


# Returns the units whose preceding gap is to be fetched with its neighbours.
def _gaps_to_bridge(batch: Sequence[tuple[int, int]], units: Sequence[int]) -> set[tuple[int, int]]:
    gaps = sorted(
        ((unit - before - 1) * units[blob], blob, unit)
        for (blob_before, before), (blob, unit) in pairwise(batch)
        if blob == blob_before and unit > before + 1
    )
    left = sum(units[blob] for blob, _ in batch) * _GAP_SHARE
    bridged = set()
    for size, blob, unit in gaps:
        left -= size
        if left < 0 or size > _MOST_GAP:
            break
        bridged.add((blob, unit))
    return bridged


class Prefetch:
    """Fetches the ranges that ``find`` returns, in its own threads, which end when all is cached.

    One of them calls ``find``. Ends early when a blob is closed, when several requests in a row failed, or when
    readers read something else; the image works on without.
    """

    def __init__(self, name: str, blobs: Sequence[CachedBlob], find: Callable[[], Iterable[Range]]) -> None:
        self.name = name
        self._blobs = blobs
        self._find = find
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._pieces: Iterator[Piece] = iter(())
        self._failures = 0
        self._under_way = 0
        self._given_up = False
        self._surprises_before = blobs[0].demand.surprised.entered
        self._leader = threading.Thread(target=self._run, name="obdlab-prefetch", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._leader.start()

    def stop(self) -> None:
        """Send no further requests; does not wait for those in flight."""
        self._stopped.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end. Return False on timeout."""
        self._leader.join(timeout_s)
        return not self._leader.is_alive()

    def _run(self) -> None:
        held = [blob for blob in self._blobs if blob.hold()]
        try:
            if len(held) == len(self._blobs):
                with self._blobs[0].demand.announced:
                    self._fetch_all()
        except ObdlabError as error:
            logger.warning("%s: not replayed: %s", self.name, error)
        except Exception:
            logger.exception("%s: replay failed unexpectedly", self.name)
        finally:
            for blob in held:
                blob.expect(b"")
                blob.let_go()

    def _fetch_all(self) -> None:
        began = time.monotonic()
        pieces = list(plan(self._ranges(), [blob.unit for blob in self._blobs]))
        self._expect(pieces)
        self._pieces = iter(pieces)
        helpers = [
            threading.Thread(target=self._work, name="obdlab-prefetch", daemon=True)
            for _ in range(1, min(ANNOUNCED_REQUESTS, len(pieces)))
        ]
        for thread in helpers:
            thread.start()
        self._work()
        for thread in helpers:
            thread.join()
        total = self._total("prefetch_bytes")
        logger.info("%s: %d bytes prefetched in %.3f s", self.name, total, time.monotonic() - began)

    def _ranges(self) -> Iterator[Range]:
        left = _MOST_UNITS
        for blob, begin, end in self._find():
            left -= 1 + (end - begin) // self._blobs[blob].unit
            if left < 0:
                logger.warning("%s: names the same data again and again, its rest is left out", self.name)
            if left < 0 or self._stopped.is_set():
                return
            yield blob, begin, end

    def _expect(self, pieces: Sequence[Piece]) -> None:
        expected = [bytearray(-(-blob.size // blob.unit)) for blob in self._blobs]
        for piece in pieces:
            expected[piece.blob][piece.first : piece.stop] = b"\1" * (piece.stop - piece.first)
        for blob, units in zip(self._blobs, expected, strict=True):
            blob.expect(bytes(units))

    def _work(self) -> None:
        while (piece := self._next()) is not None:
            try:
                self._blobs[piece.blob].prefetch(piece.first, piece.stop)
                self._failures = 0
            except ObdlabError as error:
                self._failures += 1
                level = logging.WARNING if self._failures == _FAILURES else logging.INFO
                logger.log(level, "%s: prefetching failed: %s", self.name, error)
            finally:
                with self._lock:
                    self._under_way -= self._size_of(piece)

    def _next(self) -> Piece | None:
        while not self._ends():
            with self._lock:
                if may_announce(self._under_way, surprised=self._blobs[0].demand.surprised.busy):
                    piece = next(self._pieces, None)
                    if piece is not None:
                        self._under_way += self._size_of(piece)
                    return piece
            time.sleep(_LOOK_S)
        return None

    def _size_of(self, piece: Piece) -> int:
        return (piece.stop - piece.first) * self._blobs[piece.blob].unit

    def _ends(self) -> bool:
        if self._stopped.is_set() or self._failures >= _FAILURES or any(blob.closed for blob in self._blobs):
            return True
        surprises = self._blobs[0].demand.surprised.entered - self._surprises_before
        if surprises < _MOST_SURPRISES or surprises <= self._total("prefetch_hits"):
            return False
        with self._lock:
            told, self._given_up = self._given_up, True
        if not told:
            logger.warning("%s: given up, readers read something else", self.name)
        self.stop()
        return True

    def _total(self, counter: str) -> int:
        return sum(getattr(blob.counters, counter) for blob in self._blobs)
