"""The root of every error this package raises, the kinds that cross rooms, and their codes, which cross processes.

An error that only one module raises is declared beside its raiser; all derive from :class:`ObdlabError`.
A message names the problem, the place (blob, offset), the value got and the value wanted. Code asks for the class of
an error, or of its causes, and never for words of its message.
errno and gRPC codes are not here: ``devices`` and ``snapshotter`` hold one mapping each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class ObdlabError(Exception):
    """Anything that goes wrong inside obdlab and is not a bug: bad input, a failing source, a refused device.

    ``code`` names the class for other processes, which may run another version: it stays when a class is renamed or
    moved. It contains the codes of the base classes ("source.registry"). Other processes see a class without a code
    of its own as its base class.
    """

    code: str = "error"

    def __init_subclass__(cls, *, code: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        if not code:
            return
        cls.code = code if cls.code == ObdlabError.code else f"{cls.code}.{code}"
        if cls.code in _BY_CODE:
            raise TypeError(f"two classes of errors with the code {cls.code!r}")
        _BY_CODE[cls.code] = cls


_BY_CODE: dict[str, type[ObdlabError]] = {}


class OutOfRangeError(ObdlabError, ValueError, code="out-of-range"):
    """A read or write asked for bytes outside ``[0, size)``."""


class FormatError(ObdlabError, code="format"):
    """Bytes are not what their format says: wrong magic, an index pointing outside, a truncated file.

    Retrying cannot help unless the bytes came from a cache.
    """

    # The values of an error from another process.
    what = blob = ""
    offset: int | None = None
    got: object = None
    wanted: object = None

    def __init__(
        self, what: str, *, blob: str = "", offset: int | None = None, got: object = None, wanted: object = None
    ) -> None:
        self.what = what
        self.blob = blob
        self.offset = offset
        self.got = got
        self.wanted = wanted
        super().__init__(_sentence(what, blob, offset, got, wanted))


class CorruptBlobError(FormatError, code="corrupt"):
    """A checksum did not match, or a block did not decompress: the bytes were damaged after they were written."""


class SourceError(ObdlabError, code="source"):
    """Bytes could not be read from their origin (registry, disk). ``temporary``: trying again may help."""

    # The values of an error from another process.
    blob = ""
    offset: int | None = None
    temporary = False

    def __init__(self, what: str, *, blob: str = "", offset: int | None = None, temporary: bool = False) -> None:
        self.blob = blob
        self.offset = offset
        self.temporary = temporary
        super().__init__(_sentence(what, blob, offset, None, None))


class DeviceError(ObdlabError, code="device"):
    """A block device, mount or device server could not be made, found or taken down."""


def of_code(code: str) -> type[ObdlabError]:
    """Return the class with this code, or its nearest base class that this process knows."""
    while code and code not in _BY_CODE:
        code = code.rpartition(".")[0]
    return _BY_CODE.get(code, ObdlabError)


def restored(code: str, text: str, cause: ObdlabError | None = None) -> ObdlabError:
    """Return an error that another process raised. Only its class, text and cause are known here.

    It keeps ``code``, also where this process has not imported the class: a process that passes it on (the device
    host, before it has warmed up) takes nothing from it.
    """
    kind = of_code(code)
    error = kind.__new__(kind, text)
    error.code = code
    error.__cause__ = cause
    return error


def caused_by(error: BaseException, kind: type[BaseException]) -> bool:
    """Return True if the error, or one of its causes, is of this kind."""
    return any(isinstance(each, kind) for each in causes(error))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, then its causes and contexts (the errors during whose handling others were raised)."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop(0)
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            pending += [found.__cause__, found.__context__]


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
