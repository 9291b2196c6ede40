"""Blobs uploaded while they are being made: a sink that sends chunks as they fill.

Source: OCI distribution specification 1.1, "Pushing a blob in chunks" (POST, PATCH with Content-Range, PUT). The
stream cannot be rewound, so the written bytes are also kept in an unnamed file: an interrupted chunk is sent again
from the registry's position, and a lost upload begins again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from typing import IO, TYPE_CHECKING, Self, cast
from urllib.parse import quote

from obdlab.call import Call
from obdlab.formats.decimal import decimal
from obdlab.registry.answer import from_response
from obdlab.registry.errors import RegistryError
from obdlab.registry.redirects import redirected
from obdlab.registry.session import PUSH

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from obdlab.registry.answer import Answer
    from obdlab.registry.reference import Repository
    from obdlab.registry.session import Session

logger = logging.getLogger(__name__)

CHUNK = 16 << 20
_LARGEST_CHUNK = 1 << 30
# The slowest upload that the deadline allows for.
SLOWEST_UPLOAD = 64 << 10
# Most uploads begun for a blob, and most tries of a chunk.
_UPLOADS = 3
_TRIES = 5
_CANCEL_S = 5.0

_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,19})", re.ASCII)


class BlobSink:
    """Takes a blob's bytes and uploads them meanwhile, in its own thread. One writer; made by ``push_stream``.

    ``close`` returns digest and size once the registry has the whole blob, and leaving the ``with`` block without an
    error calls it; leaving it with one, or ``abort``, gives the upload up. ``write`` and ``close`` raise the error of
    the upload: RegistryError naming repository and offset; and OSError if the file cannot take the bytes.
    """

    def __init__(self, session: Session, repository: Repository, *, chunk: int = CHUNK) -> None:
        if not 1 <= chunk <= _LARGEST_CHUNK:
            raise ValueError(f"upload chunk: wanted 1 to {_LARGEST_CHUNK} bytes (got {chunk})")
        import tempfile  # with all compressions of the standard library: not for reading

        self._upload = _Upload(session, repository)
        self._chunk = chunk
        self._hash = hashlib.sha256()
        self._size = 0
        self._spool = tempfile.TemporaryFile(prefix="obdlab-upload-", buffering=0)  # noqa: SIM115 - closed with the sink
        self._changed = threading.Condition()
        self._ended = False
        self._given_up = False
        self._error: BaseException | None = None
        self._done: tuple[str, int] | None = None
        self._thread = threading.Thread(target=self._run, name="obdlab-upload", daemon=True)
        self._thread.start()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of ``data``; returns its length."""
        self._check_open()
        view = memoryview(data).cast("B")
        self._hash.update(view)
        rest = view
        while rest:
            rest = rest[self._spool.write(rest) :]
        with self._changed:
            self._size += len(view)
            self._changed.notify_all()
        return len(view)

    def close(self) -> tuple[str, int]:
        """Upload the rest, and return the blob's digest and size. Closing again returns the same."""
        if self._done is not None:
            return self._done
        self._check_open()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        self._spool.close()
        if self._error is not None:
            self._given_up = True
            self._upload.cancel()
            raise self._error
        self._done = (self._digest(), self._size)
        return self._done

    def abort(self) -> None:
        """Give the upload up, and ask the registry to cancel it."""
        if self._done is not None or self._given_up:
            return
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
        self._thread.join()
        self._spool.close()
        self._upload.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort()
            return
        try:
            self.close()
        finally:
            self.abort()

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._ended or self._given_up:
            raise ValueError("write to a closed upload")

    def _digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    # -- the uploading thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for number in range(1, _UPLOADS + 1):
                try:
                    self._send_all()
                    return
                except RegistryError as error:
                    if self._given_up or number == _UPLOADS or not _may_begin_anew(error):
                        raise
                    logger.warning("%s: upload begins anew: %s", self._upload.name, error)
                    self._upload.cancel()
        except BaseException as error:
            self._error = error

    def _send_all(self) -> None:
        self._upload.begin()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._given_up or self._ended or self._size - self._upload.sent >= self._least()
                )
                if self._given_up:
                    return
                stop, ended = self._size, self._ended
            while stop - self._upload.sent >= self._least() or (ended and stop > self._upload.sent):
                if self._given_up:
                    return
                self._upload.send_chunk(self._spool, min(stop, self._upload.sent + self._least()))
            if ended:
                self._upload.finish(self._digest(), stop)
                return

    def _least(self) -> int:
        return max(self._chunk, self._upload.least_chunk)


class _Upload:
    # One upload at the registry, and its position.
    def __init__(self, session: Session, repository: Repository) -> None:
        self.name = str(repository)
        self.sent = 0
        self.least_chunk = 0
        self._session = session
        self._repository = repository
        self._location = ""

    def begin(self) -> None:
        doing = "starting upload"
        url = f"{self._repository.blobs_url}/uploads/"

        def attempt(call: Call) -> None:
            response = self._request("POST", url, {"Content-Length": "0"}, doing, call)
            if response.status != 202:
                raise from_response(response, doing)
            self._follow(response, url, doing)
            self.least_chunk = min(decimal(response.headers.get("oci-chunk-min-length", "")) or 0, _LARGEST_CHUNK)

        self.sent = 0
        self._session.persist(attempt, blob=self.name, tries=_TRIES)

    def send_chunk(self, spool: IO[bytes], stop: int) -> None:
        """Send the bytes from the registry's position to ``stop``. After a break, ask for the position first."""
        doing = "uploading"
        broken = False

        def attempt(call: Call) -> None:
            nonlocal broken
            if broken:
                self._ask_position(stop, call)
            if self.sent >= stop:
                return
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Range": f"{self.sent}-{stop - 1}",
                "Content-Length": str(stop - self.sent),
            }
            broken = True
            begin = self.sent
            response = self._request(
                "PATCH", self._location, headers, doing, call, lambda: cast("IO[bytes]", _Section(spool, begin, stop))
            )
            if response.status not in (202, 201, 204):
                raise from_response(response, doing)
            self._follow(response, self._location, doing)
            taken = _taken(response)
            if taken is not None and not begin < taken <= stop:
                raise RegistryError(f"{doing}: registry lost its place (got {taken}, wanted {stop})", status=416)
            self.sent = stop if taken is None else taken
            if self.sent < stop:
                raise RegistryError(f"{doing}: registry took a part (got {taken}, wanted {stop})", temporary=True)

        extra_s = (stop - self.sent) / SLOWEST_UPLOAD
        self._session.persist(attempt, blob=self.name, offset=self.sent, extra_s=extra_s, tries=_TRIES)

    def finish(self, digest: str, size: int) -> None:
        doing = "finishing upload"
        done = False

        def attempt(call: Call) -> None:
            nonlocal done
            if done and self._holds(digest, call):
                return  # the answer to the first try was lost, not the blob
            url = f"{self._location}{'&' if '?' in self._location else '?'}digest={quote(digest, safe='')}"
            done = True
            response = self._request("PUT", url, {"Content-Length": "0"}, doing, call)
            if response.status not in (201, 204):
                raise from_response(response, doing)
            response.close()

        extra_s = size / SLOWEST_UPLOAD  # it may be read again
        self._session.persist(attempt, blob=f"{self.name}@{digest}", extra_s=extra_s, tries=_TRIES)

    def cancel(self) -> None:
        """Ask the registry to cancel the upload. If it ignores the request, the upload expires by itself."""
        location, self._location = self._location, ""
        if not location:
            return
        try:
            doing = "cancelling upload"
            self._session.persist(
                lambda call: self._request("DELETE", location, {}, doing, call).close(),
                blob=self.name,
                call=Call(time.monotonic() + _CANCEL_S),
                tries=1,
            )
        except RegistryError as error:
            logger.debug("%s", error)

    def _ask_position(self, stop: int, call: Call) -> None:
        doing = "asking how far an upload is"
        response = self._request("GET", self._location, {}, doing, call)
        if response.status not in (204, 202):
            raise from_response(response, doing)
        self._follow(response, self._location, doing)
        taken = _taken(response)
        # A registry that has nothing also answers "0-0": then the one byte is sent again, or refused.
        taken = 0 if taken is None or taken == 1 else taken
        if not self.sent <= taken <= stop:
            raise RegistryError(f"{doing}: registry lost its place (got {taken}, wanted {self.sent})", status=416)
        self.sent = taken

    def _holds(self, digest: str, call: Call) -> bool:
        response = self._request("HEAD", f"{self._repository.blobs_url}/{digest}", {}, "looking for blob", call)
        response.close()
        return response.status < 400

    def _follow(self, response: Answer, url: str, doing: str) -> None:
        # Closes the answer.
        response.close()
        location = response.headers.get("location", "")
        self._location = redirected(url, location, doing) if location else url

    def _request(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        doing: str,
        call: Call,
        body: Callable[[], IO[bytes]] | None = None,
    ) -> Answer:
        return self._session.request(
            self._repository, method, url, headers, doing=doing, call=call, actions=PUSH, body=body
        )


class _Section:
    # The bytes [position, stop) of a file that another thread is still appending to.
    def __init__(self, file: IO[bytes], position: int, stop: int) -> None:
        self._fd = file.fileno()
        self._position = position
        self._stop = stop

    def read(self, size: int = -1) -> bytes:
        left = self._stop - self._position
        data = os.pread(self._fd, left if size is None or size < 0 else min(size, left), self._position)
        self._position += len(data)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _may_begin_anew(error: RegistryError) -> bool:
    # A forgotten or misplaced upload is not fatal for the blob: it can be begun again.
    return error.temporary or error.status in (400, 404, 409, 416, 499)


def _taken(response: Answer) -> int | None:
    # Returns the number of bytes that the registry reports to have.
    match = _RANGE.fullmatch(response.headers.get("range", "").strip())
    return int(match[1]) + 1 if match else None
