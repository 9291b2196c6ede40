"""A whole blob, read from its start and checked against size and digest at its end."""

from __future__ import annotations

import hashlib
import io
import time
from typing import TYPE_CHECKING

from obdlab.call import Call
from obdlab.errors import CorruptBlobError
from obdlab.registry.answer import check_content_range, check_size, skip
from obdlab.registry.errors import RegistryError
from obdlab.registry.failures import TRANSPORT_ERRORS, from_exception
from obdlab.registry.tries import persist

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from obdlab.registry.answer import Answer

# A stream gets a fresh deadline for each window of this size.
_STREAM_WINDOW = 1 << 20


class BlobStream(io.RawIOBase):
    """A blob read from start to end, checked against its size and sha256 digest; reopened after breaks.

    Leaving its ``with`` block without an error reads and checks the rest; so does reading the last byte. Until then
    the data is unverified. Raises RegistryError when the registry fails for longer than the deadline,
    CorruptBlobError when the content does not match.
    """

    def __init__(
        self,
        open_at: Callable[[int, Call], Answer],
        *,
        name: str,
        digest: str,
        size: int,
        deadline_s: float,
    ) -> None:
        self._open_at = open_at
        self._name = name
        self._digest = digest
        self._size = size
        self._deadline_s = deadline_s
        self._hash = hashlib.sha256()
        self._position = 0
        self._response: Answer | None = None
        self._window_end = 0
        self._window_left_s = 0.0

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._position

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to ``size`` bytes; fewer only at the end or after a break."""
        if size is None or size < 0:
            return self.readall()
        if self.closed:
            raise ValueError("read from a closed blob stream")
        size = min(size, self._size - self._position)
        data = self._read_on(size) if size else b""
        self._hash.update(data)
        self._position += len(data)
        if self._position == self._size:
            self._verify()
        return data

    def readall(self) -> bytes:
        chunks = []
        while chunk := self.read(_STREAM_WINDOW):
            chunks.append(chunk)
        return b"".join(chunks)

    def readinto(self, buffer: object, /) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Stop reading. Unread bytes are not checked."""
        if self._response is not None:
            self._response.close()
            self._response = None
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self.closed:
                while self.read(_STREAM_WINDOW):
                    pass
        finally:
            self.close()

    def _read_on(self, size: int) -> bytes:
        if self._position >= self._window_end:
            self._window_end = self._position + _STREAM_WINDOW
            self._window_left_s = self._deadline_s
        started = time.monotonic()  # only the time spent here counts: the caller may be slow
        call = Call(started + self._window_left_s)
        try:
            return persist(lambda terms: self._attempt(size, terms), call, blob=self._name, offset=self._position)
        finally:
            self._window_left_s -= time.monotonic() - started

    def _attempt(self, size: int, call: Call) -> bytes:
        doing = "reading blob"
        try:
            if self._response is None:
                self._response = self._open_at(self._position, call)
                self._check_start(self._response, doing)
            data = self._response.read(size, call)
            if not data:
                raise RegistryError(f"{doing}: answer broke off", temporary=True)
        except (*TRANSPORT_ERRORS, RegistryError) as error:
            if self._response is not None:
                self._response.close()
                self._response = None
            raise error if isinstance(error, RegistryError) else from_exception(error, doing) from error
        return data

    def _check_start(self, response: Answer, doing: str) -> None:
        left = self._size - self._position
        if response.status == 206:
            check_content_range(response, self._position, left, doing, self._size)
        else:
            check_size(response.left, self._size, doing)
            skip(response, self._position, doing, limit=self._position)

    def _verify(self) -> None:
        if self._has_more():
            raise CorruptBlobError("blob longer than it should be", blob=self._name, wanted=self._size)
        digest = f"sha256:{self._hash.hexdigest()}"
        if digest != self._digest:
            raise CorruptBlobError("wrong content", blob=self._name, got=digest, wanted=self._digest)

    def _has_more(self) -> bool:
        # Only an answer without a length can have more bytes; an answer that breaks off here has no more.
        response = self._response
        if response is None or response.left is not None:
            return False
        try:
            return bool(response.read(1, Call(time.monotonic() + self._deadline_s)))
        except TRANSPORT_ERRORS:
            return False
