"""A blob of a registry that serves blobs only whole: the first read far inside brings all of it into the cache.

The part before a range is skipped while it is small (:mod:`obdlab.registry.answer`). For a range behind that, the
blob is fetched once from its beginning, stored where the cache lacks it, and compared with its digest at the end.
Until then, its bytes are those of any lazily read layer: the sums of the turboOCI layer check them. Processes that
share the cache share the download.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.blob import Wrapper
from obdlab.errors import CorruptBlobError, ObdlabError, SourceError, caused_by
from obdlab.registry.errors import RangesIgnoredError
from obdlab.system.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.blob import Blob
    from obdlab.cache.cachedblob import CachedBlob
    from obdlab.call import Call
    from obdlab.registry.blobstream import BlobStream

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
# A cache too small for its images would drop and fetch the same blobs all the time.
_AGAIN_S = 60.0


class WholeBlob(Wrapper):
    """The blob ``below``, read through ``cached``. ``open_stream`` opens all of it at the registry.

    A reader waits for the whole blob, at most ``deadline_s``; the download goes on behind a reader that gave up. A
    blob of more than ``most`` bytes (0: no limit) is refused. Reads raise SourceError.
    """

    def __init__(
        self,
        below: Blob,
        cached: CachedBlob,
        open_stream: Callable[[], BlobStream],
        *,
        deadline_s: float,
        most: int,
    ) -> None:
        super().__init__(below)
        self._cached = cached
        self._open_stream = open_stream
        self._deadline_s = deadline_s
        self._most = most
        self._lock = threading.Lock()
        self._download: _Download | None = None

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Return the bytes, if necessary after the whole blob has come. Raises SourceError, and as the cache does."""
        try:
            return self.below.read_at(offset, length, call)
        except ObdlabError as error:
            if not caused_by(error, RangesIgnoredError):
                raise
            terms = call or self._cached.terms
            terms.about_to_wait()
            self._begun(error).wait(terms.left_s(self._deadline_s))
        return self.below.read_at(offset, length, call)

    def _begun(self, error: ObdlabError) -> _Download:
        if self._most and self.size > self._most:
            raise SourceError(
                f"{error}; it would be fetched whole, but is larger than the cache "
                f"(got {self.size} bytes, wanted at most {self._most}: cache_quota)"
            ) from error
        with self._lock:
            download = self._download
            if download is None or download.is_over(_AGAIN_S):
                logger.warning(
                    "%s: its registry serves blobs only whole: fetching all %d bytes", self.name, self.size
                )
                download = self._download = _Download(self._cached, self._open_stream)
                download.start()
        return download


class _Download:
    # One download of a blob into the cache, in a thread of its own.
    def __init__(self, blob: CachedBlob, open_stream: Callable[[], BlobStream]) -> None:
        self._blob = blob
        self._open_stream = open_stream
        self._done = threading.Event()
        self._ended = 0.0
        self._error: ObdlabError | None = None
        self._stream: BlobStream | None = None

    def start(self) -> None:
        try:
            threading.Thread(target=self._run, name="obdlab-whole", daemon=True).start()
        except RuntimeError as error:  # no thread available
            self._end(SourceError(f"no thread for it: {error}", temporary=True))

    def is_over(self, since_s: float) -> bool:
        return self._done.is_set() and time.monotonic() >= self._ended + since_s

    def wait(self, wait_s: float) -> None:
        if not self._done.wait(max(0.0, wait_s)):
            come = 0 if self._stream is None else self._stream.position
            raise SourceError(
                f"its registry serves blobs only whole, and it did not come in time (got {come} of {self._blob.size} "
                "bytes so far)",
                blob=self._blob.name,
                temporary=True,
            )
        if self._error is not None:
            raise SourceError(
                f"its registry serves blobs only whole, and it was not fetched: {self._error}", blob=self._blob.name
            ) from self._error

    def _end(self, error: ObdlabError | None) -> None:
        self._error, self._ended = error, time.monotonic()
        self._done.set()

    def _run(self) -> None:
        error: ObdlabError | None = SourceError("it ended unexpectedly", temporary=True)
        try:
            if self._blob.hold():
                try:
                    self._fetch()
                except ObdlabError as failed:
                    if caused_by(failed, CorruptBlobError):  # the digest is known only after the last byte
                        self._blob.evict(0, self._blob.size)
                    raise
                finally:
                    self._blob.let_go()
            error = None
        except ObdlabError as failed:
            logger.warning("%s: not fetched whole: %s", self._blob.name, failed)
            error = failed
        finally:
            self._end(error)

    def _fetch(self) -> None:
        with _alone(self._blob):
            if self._blob.missing_piece(0) is not None:  # another process may have been here
                with self._open_stream() as self._stream:
                    self._blob.fill(self._read)
            if self._blob.closed:
                return
            if self._blob.missing_piece(0) is not None:
                raise SourceError("the cache did not keep all of it (is its file system full?)")
            if not self._blob.verified and not self._blob.verify():
                raise SourceError("the cached bytes do not match the digest")
        logger.info("%s: fetched whole, and verified", self._blob.name)

    def _read(self, length: int) -> bytes:
        assert self._stream is not None
        pieces = []
        while length:
            if self._blob.closed:
                raise SourceError("closed before all of it came")
            piece = self._stream.read(length)
            if not piece:
                raise SourceError("broke off before its end")
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)


# Waits for a download of the blob by another process; it may hang, and readers have deadlines of their own.
@contextmanager
def _alone(blob: CachedBlob) -> Iterator[None]:
    try:
        fd = os.open(blob.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot open its directory in the cache: {error}") from error
    try:
        while not try_lock(fd):
            if blob.closed:
                raise SourceError("closed before all of it came")
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(fd)
