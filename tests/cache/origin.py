"""A small blob, where it comes from, and the cache before it: what the tests of the block cache share."""

from __future__ import annotations

import fcntl
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from obdlab.blob import Blob, MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.call import Call
from obdlab.formats.oci import digest_of

UNIT = 4096
DATA = random.Random(7).randbytes(40 * UNIT + 123)
DIGEST = digest_of(DATA)


class Origin(MemoryBlob):
    """A blob that remembers what was asked of it, and does what a test wants before answering."""

    def __init__(self, data: bytes = DATA, before: Callable[[int, int], None] | None = None) -> None:
        super().__init__(data, "origin")
        self.reads: list[tuple[int, int]] = []
        self.before = before
        self.evicted: list[tuple[int, int]] = []
        self.closed = 0

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.reads.append((offset, length))
        if self.before is not None:
            self.before(offset, length)
        return super().read_at(offset, length, call)

    def evict(self, offset: int, length: int) -> None:
        self.evicted.append((offset, length))

    def close(self) -> None:
        self.closed += 1


def open_cached(directory: Path, origin: Blob, **options: int) -> CachedBlob:
    options = {"unit": UNIT, "readahead_max": 0, **options}
    blob = BlockCache(directory, **options).open(origin, DIGEST)
    assert isinstance(blob, CachedBlob)
    return blob


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.002)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the cache's lock, as a process of its own would."""
    with (directory / "usage").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
