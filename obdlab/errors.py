"""The root of every error this package raises, and the kinds that cross rooms.

An error that only one module raises is declared beside its raiser; all derive from :class:`ObdlabError`.
A message names the problem, the place (blob, offset), the value got and the value wanted.
errno and gRPC codes are not here: ``devices`` and ``snapshotter`` hold one mapping each.
"""

from __future__ import annotations


class ObdlabError(Exception):
    """Anything that goes wrong inside obdlab and is not a bug: bad input, a failing source, a refused device."""


class OutOfRangeError(ObdlabError, ValueError):
    """A read or write asked for bytes outside ``[0, size)``."""


class FormatError(ObdlabError):
    """Bytes are not what their format says: wrong magic, an index pointing outside, a truncated file.

    Retrying cannot help unless the bytes came from a cache.
    """

    def __init__(
        self, what: str, *, blob: str = "", offset: int | None = None, got: object = None, wanted: object = None
    ) -> None:
        self.what = what
        self.blob = blob
        self.offset = offset
        self.got = got
        self.wanted = wanted
        super().__init__(_sentence(what, blob, offset, got, wanted))


class CorruptBlobError(FormatError):
    """A checksum did not match, or a block did not decompress: the bytes were damaged after they were written."""


class SourceError(ObdlabError):
    """Bytes could not be read from their origin (registry, disk). ``temporary``: trying again may help."""

    def __init__(self, what: str, *, blob: str = "", offset: int | None = None, temporary: bool = False) -> None:
        self.blob = blob
        self.offset = offset
        self.temporary = temporary
        super().__init__(_sentence(what, blob, offset, None, None))


class DeviceError(ObdlabError):
    """A block device, mount or device server could not be made, found or taken down."""


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | SystemExit | None:
    """Return the interrupt or exit that was being raised when ``error`` replaced it, or None.

    An error raised by cleaning up (``finally``, an ExitStack) replaces the exception that was passing and keeps it
    as its context. Code that turns errors into results calls this first.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is None or id(found) in seen:
            continue
        if isinstance(found, KeyboardInterrupt | SystemExit):
            return found
        seen.add(id(found))
        pending += [found.__context__, found.__cause__]
        if isinstance(found, BaseExceptionGroup):
            pending += found.exceptions
    return None


def _sentence(what: str, blob: str, offset: int | None, got: object, wanted: object) -> str:
    where = f"{blob}: " if blob else ""
    at = f" at offset {offset}" if offset is not None else ""
    values = []
    if got is not None:
        values.append(f"got {got}")
    if wanted is not None:
        values.append(f"wanted {wanted}")
    tail = f" ({', '.join(values)})" if values else ""
    return f"{where}{what}{at}{tail}"
