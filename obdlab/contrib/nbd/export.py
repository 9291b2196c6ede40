"""An NBD export: executes requests as calls on a blob. Touches no socket."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from obdlab.blob import WritableBlob
from obdlab.call import UNBOUND
from obdlab.contrib.nbd import protocol
from obdlab.contrib.nbd.protocol import Command, Export, Flag
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.blob import Blob, Buffer
    from obdlab.call import Call

_ZEROS = bytes(1 << 20)
#: Maps a byte range to its extents in order, each a length and whether it holds data (else zeros); may end early.
Extents = Callable[[int, int], list[tuple[int, bool]]]
_FLAGS = {
    Command.READ: Flag.DF,
    Command.WRITE: Flag.FUA,
    Command.FLUSH: Flag(0),
    Command.TRIM: Flag.FUA,
    Command.WRITE_ZEROES: Flag.FUA | Flag.NO_HOLE,
    Command.BLOCK_STATUS: Flag.REQUEST_ONE,
}


def errno_of(error: Exception) -> tuple[int, str]:
    """Map an error to one of the protocol's error numbers and a text for the client."""
    if isinstance(error, OSError):
        known = (errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOPNOTSUPP)
        number = errno.ENOSPC if error.errno == errno.EDQUOT else error.errno
        return (number if number in known else errno.EIO), error.strerror or str(error)
    if isinstance(error, MemoryError):
        return errno.ENOMEM, "out of memory"
    return errno.EIO, str(error) if isinstance(error, ObdlabError) else type(error).__name__


class NbdExport:
    """``blob`` under a name; writable if the blob is, unless ``read_only``. The empty name means this export too."""

    def __init__(
        self, blob: Blob, name: str = "", *, read_only: bool = False, extents: Extents | None = None
    ) -> None:
        self.blob = blob
        self.name = name
        self._writable = blob if isinstance(blob, WritableBlob) and not read_only else None
        self._extents = extents
        flags = Export.HAS_FLAGS | Export.DF | Export.FLUSH | Export.MULTI_CONN
        if self._writable is None:
            flags |= Export.READ_ONLY
        else:
            flags |= Export.FUA | Export.TRIM | Export.WRITE_ZEROES
        #: The transmission flags clients see.
        self.flags = int(flags)
        #: Fixed for the export's life: clients do not ask again.
        self.size = blob.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._writable is None

    @property
    def knows_extents(self) -> bool:
        """Whether BLOCK_STATUS can be answered."""
        return self._extents is not None

    def is_called(self, name: bytes) -> bool:
        """Whether a client that asks for ``name`` means this export."""
        return name in (b"", self.name.encode())

    def check(self, command: int, flags: int, offset: int, length: int) -> None:
        """Raise OSError, with the number the client gets, unless the request is valid."""
        allowed = _FLAGS.get(command)  # type: ignore[call-overload]  # an IntEnum's member equals its number
        if allowed is None:
            raise OSError(errno.EINVAL, f"no such command ({command})")
        if flags & ~int(allowed):  # the inverse of an IntFlag has only the bits that it knows
            raise OSError(errno.EINVAL, f"command {command} with flags {flags:#x}")
        if command == Command.FLUSH:
            return
        changes = command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
        if changes and self._writable is None:
            raise OSError(errno.EPERM, "the export is read-only")
        if offset + length > self.size:
            number = errno.ENOSPC if changes else errno.EINVAL
            raise OSError(number, f"[{offset}, {offset + length}) is not inside [0, {self.size})")
        if not length or (command == Command.READ and length > protocol.MAX_TRANSFER):
            raise OSError(errno.EINVAL, f"command {command} of {length} bytes")

    def read(self, offset: int, length: int, call: Call = UNBOUND) -> bytes:
        """Return the bytes of a checked READ. Raises the blob's errors."""
        data = self.blob.read_at(offset, length, call)
        if len(data) != length:
            raise RuntimeError(f"read_at returned {len(data)} of {length} bytes")
        return data

    def change(self, command: int, flags: int, offset: int, length: int, data: Buffer, call: Call = UNBOUND) -> None:
        """Do a checked WRITE, TRIM, WRITE_ZEROES or FLUSH. Raises the blob's errors."""
        blob = self._writable
        if blob is None:  # check() lets only a FLUSH through here
            return
        if command == Command.WRITE:
            blob.write_at(offset, data, call)
        elif command == Command.WRITE_ZEROES and flags & Flag.NO_HOLE:
            for at in range(offset, offset + length, len(_ZEROS)):
                blob.write_at(at, memoryview(_ZEROS)[: min(len(_ZEROS), offset + length - at)], call)
        elif command != Command.FLUSH:
            blob.discard(offset, length, call)
        if command == Command.FLUSH or flags & Flag.FUA:
            call.about_to_wait()
            blob.flush()

    def block_status(self, flags: int, offset: int, length: int) -> bytes:
        """Return the extents of a checked BLOCK_STATUS as the protocol packs them."""
        if self._extents is None:
            raise OSError(errno.EINVAL, "base:allocation was not agreed on")
        found = self._extents(offset, length)
        if flags & Flag.REQUEST_ONE:
            del found[1:]
        zero = protocol.EXTENT_HOLE | protocol.EXTENT_ZERO
        return b"".join(protocol.EXTENT.pack(size, 0 if data else zero) for size, data in found)
