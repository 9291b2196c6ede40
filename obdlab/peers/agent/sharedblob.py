"""A blob that an agent passes on: from the cache's files, or from transfers, under way or begun for a reader."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from obdlab.blob import Blob, check_range
from obdlab.errors import SourceError
from obdlab.peers.agent.route import CHUNK
from obdlab.peers.agent.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.cache.units import CachedUnits
    from obdlab.call import Call
    from obdlab.image.treenodes import TreeNodes
    from obdlab.peers.agent.fetcher import Fetcher, Wanted
    from obdlab.peers.agent.tallies import Tallies

logger = logging.getLogger(__name__)

#: Most bytes of one transfer.
MOST_AT_ONCE = 1 << 20
# Bytes that are loaded from the cache's files at a time.
_LOAD = 256 << 10
# A reader of a long range has this many transfers under way.
_AHEAD = 2


class Recent:
    """The latest transfers of all blobs, kept in memory up to ``most`` bytes. Thread-safe.

    Agents below ask for a block right after this one got it: its store need not have ended, and no disk is read.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[Transfer, SharedBlob] = OrderedDict()
        self._bytes = 0

    def add(self, transfer: Transfer, blob: SharedBlob) -> None:
        """Keep a transfer that is over, and forget the oldest ones."""
        dropped = []
        with self._lock:
            self._kept[transfer] = blob
            self._bytes += transfer.end - transfer.begin
            while self._bytes > self._most:
                oldest, owner = self._kept.popitem(last=False)
                self._bytes -= oldest.end - oldest.begin
                dropped.append((oldest, owner))
        for oldest, owner in dropped:
            owner.forget(oldest)

    def drop(self, blob: SharedBlob) -> None:
        """Forget a blob's transfers."""
        with self._lock:
            gone = [transfer for transfer, owner in self._kept.items() if owner is blob]
            for transfer in gone:
                del self._kept[transfer]
                self._bytes -= transfer.end - transfer.begin


class SharedBlob:
    """One blob; thread-safe. ``nodes`` are those of its hash tree, which this object owns.

    Transfers run in ``pool``: a reader that goes away ends none, as others may have joined it.
    """

    def __init__(
        self,
        wanted: Wanted,
        units: CachedUnits,
        nodes: TreeNodes | None,
        fetcher: Fetcher,
        pool: ThreadPoolExecutor,
        recent: Recent,
        tallies: Tallies,
    ) -> None:
        self.wanted = wanted
        self.size = wanted.size
        self._units, self._nodes, self._fetcher, self._pool = units, nodes, fetcher, pool
        self._recent, self._tallies = recent, tallies
        self._unit = units.files.unit
        self._lock = threading.Lock()
        # By unit: transfers under way, and those that are kept in memory.
        self._transfers: dict[int, Transfer] = {}
        self._users = 0
        self._closing = False
        self.used = time.monotonic()

    def hold(self) -> bool:
        """Keep the blob open until :meth:`release`. Return False if it was closed."""
        with self._lock:
            if not self._closing:
                self._users += 1
                self.used = time.monotonic()
            return not self._closing

    def release(self) -> None:
        """End a :meth:`hold`."""
        with self._lock:
            self._users -= 1

    def close_unused(self) -> bool:
        """Close the files, unless readers or transfers use them. Return True if closed."""
        with self._lock:
            if self._users or self._closing:
                return False
            self._closing = True
            self._transfers.clear()
        self._recent.drop(self)
        self._units.files.close()
        if self._nodes is not None:
            self._nodes.close()
        return True

    def read(self, begin: int, end: int, hops: tuple[str, ...], patience_s: float) -> Iterator[tuple[bytes, str]]:
        """Yield the bytes ``[begin, end)`` as they come, each piece with its place: "cache" or "transfer".

        A wait for the next bytes ends after ``patience_s``.

        Call it between :meth:`hold` and :meth:`release`. Raises what the fetch raised, and TimeoutError.
        """
        offset = begin
        while offset < end:
            unit = offset // self._unit
            stop = -(-end // self._unit)
            transfer = self._transfers.get(unit)
            if transfer is None:
                most = min(stop, unit + _LOAD // self._unit)
                data = self._units.load(unit, most)
                if data:
                    self._units.note_use(unit, unit + -(-len(data) // self._unit))
                    piece = data[offset - unit * self._unit : end - unit * self._unit]
                    yield piece, "cache"
                    offset += len(piece)
                    continue
                transfer = self._begin(unit, stop, hops)
                if transfer is None:
                    continue  # it was stored meanwhile
            else:
                self._tallies.add("attached")
            self._begin_ahead(transfer.end, end, hops)
            last = min(transfer.end, end)
            while offset < last:
                piece = transfer.after(offset, time.monotonic() + patience_s)[: last - offset]
                yield piece, "transfer"
                offset += len(piece)

    def waits_for(self, offset: int) -> bool:
        """Return True if the bytes at ``offset`` are on their way."""
        transfer = self._transfers.get(offset // self._unit)
        return transfer is not None and not transfer.over

    def drop(self, begin: int, end: int) -> None:
        """Forget units that a reader found wrong."""
        first, stop = begin // self._unit, -(-end // self._unit)
        with self._lock:
            for unit in range(first, stop):
                if unit in self._transfers and self._transfers[unit].over:
                    del self._transfers[unit]
        self._units.drop(first, stop)

    def forget(self, transfer: Transfer) -> None:
        """Let go of a transfer's bytes in memory."""
        with self._lock:
            for unit in range(transfer.begin // self._unit, -(-transfer.end // self._unit)):
                if self._transfers.get(unit) is transfer:
                    del self._transfers[unit]

    def _begin_ahead(self, offset: int, end: int, hops: tuple[str, ...]) -> None:
        stop = -(-end // self._unit)
        for _ in range(_AHEAD - 1):
            unit = offset // self._unit
            if offset >= end or unit in self._transfers:
                return
            transfer = self._begin(unit, stop, hops)
            if transfer is None:
                return
            offset = transfer.end

    # Begins a transfer of the missing units from one on; returns one that has that unit already if there is one, and
    # None if the unit is in the cache.
    def _begin(self, unit: int, stop: int, hops: tuple[str, ...]) -> Transfer | None:
        most = max(1, MOST_AT_ONCE // self._unit)
        with self._lock:
            found = self._transfers.get(unit)
            if found is not None:
                return found
            if self.wanted.whole:
                first, last = 0, self._units.files.units
            else:
                chunk_end = (unit * self._unit // CHUNK + 1) * CHUNK // self._unit
                first, stop = unit, min(stop, unit + most, max(chunk_end, unit + 1))
                there = self._units.files.present(first, stop)
                if there[0]:
                    return None
                last = first + 1
                while last < stop and not there[last - first] and last not in self._transfers:
                    last += 1
            transfer = Transfer(first * self._unit, min(last * self._unit, self.size))
            for number in range(first, last):
                self._transfers[number] = transfer
            # The transfer's own use of the files, which ends when it is stored: its readers may be done before.
            self._users += 1
        try:
            self._pool.submit(self._run, transfer, hops)
        except RuntimeError as error:  # the agent ends
            self.forget(transfer)
            self.release()
            raise SourceError("agent is ending", blob=self.wanted.name, temporary=True) from error
        return transfer

    def _run(self, transfer: Transfer, hops: tuple[str, ...]) -> None:
        try:
            self._fetch(transfer, hops)
        finally:
            self.release()

    def _fetch(self, transfer: Transfer, hops: tuple[str, ...]) -> None:
        error: Exception | None = None
        try:
            self._fetcher.fetch(self.wanted, transfer, hops)
        except Exception as caught:  # each reader raises it
            logger.info("%s: %s", self.wanted.name, caught)
            error = caught
        content = transfer.content()
        if error is not None:
            content = content[: len(content) - len(content) % self._unit]
        try:
            transfer.finish(error)
            if content:
                self._units.reattach()
                self._units.store(transfer.begin // self._unit, content)
        finally:
            if error is None:
                self._recent.add(transfer, self)
            else:
                self.forget(transfer)


class SharedFile(Blob):
    """A shared blob as a Blob, for the file of a hash tree. Closing it releases the shared blob."""

    def __init__(self, shared: SharedBlob, deadline_s: float) -> None:
        self.name = shared.wanted.name
        self._shared: SharedBlob | None = shared
        self._size, self._deadline_s = shared.size, deadline_s

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        shared = self._shared
        if shared is None:
            raise SourceError("read after close", blob=self.name, offset=offset)
        patience_s = self._deadline_s if call is None else call.left_s(self._deadline_s)
        try:
            return b"".join(piece for piece, _ in shared.read(offset, offset + length, (), patience_s))
        except TimeoutError as error:
            raise SourceError(str(error), blob=self.name, offset=offset, temporary=True) from error

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        if self._shared is not None and length:
            self._shared.drop(offset, offset + length)

    def close(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.release()
