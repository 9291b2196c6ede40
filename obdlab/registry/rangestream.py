"""A byte range of a blob, read as it arrives: one request, for any duration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.call import UNBOUND
from obdlab.closing import Closing
from obdlab.observe.counters import DOWNLOAD_BYTES
from obdlab.registry.answer import go_to_range
from obdlab.registry.errors import RegistryError
from obdlab.registry.failures import TRANSPORT_ERRORS, from_exception

if TYPE_CHECKING:
    from obdlab.call import Call
    from obdlab.registry.answer import Answer

_DOING = "streaming blob"


class RangeStream(Closing):
    """Reads ``[offset, offset + length)`` of a blob forwards from the answer to a range request.

    Nothing is retried here: the caller knows which bytes have come, and requests the rest. A context manager; leaving
    it before the end closes the connection. Raises RegistryError naming the blob.
    """

    def __init__(self, response: Answer, *, name: str, offset: int, length: int, size: int | None = None) -> None:
        self._response = response
        self._name = name
        #: Offset of the next byte.
        self.position = offset
        #: End of the range.
        self.end = offset + length
        try:
            go_to_range(response, offset, length, _DOING, size)
        except (*TRANSPORT_ERRORS, RegistryError) as error:
            raise self._failed(error) from error

    def read(self, length: int, call: Call | None = None) -> bytes:
        """Return exactly ``length`` bytes, by the deadline of ``call``; without it, each silence is bounded."""
        if length > self.end - self.position:
            raise ValueError(f"read past the end (got {length}, wanted at most {self.end - self.position})")
        pieces = []
        missing = length
        try:
            while missing:
                piece = self._response.read(missing, call or UNBOUND)
                if not piece:
                    raise RegistryError(f"{_DOING}: answer broke off", temporary=True)
                pieces.append(piece)
                missing -= len(piece)
        except (*TRANSPORT_ERRORS, RegistryError) as error:
            raise self._failed(error) from error
        self.position += length
        DOWNLOAD_BYTES.add(length)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Give up the unread rest."""
        self._response.close()

    def _failed(self, error: Exception) -> RegistryError:
        self.close()
        told = error if isinstance(error, RegistryError) else from_exception(error, _DOING)
        return told.at(self._name, self.position, 1)
