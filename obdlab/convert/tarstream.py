"""Members of an untrusted tar stream, read once and forwards.

The standard library's tarfile does the parsing (ustar, pax, GNU). What it lacks for input that is not trusted is
added here: a damaged header in the middle is an error instead of the end, header sizes are bounded, pax times keep
their nanoseconds, extended attributes their raw bytes, and global pax headers are ignored as containerd ignores them.

Sources: POSIX.1-2024 pax; GNU tar manual, "Basic Tar Format"; OCI image layer specification.
"""

from __future__ import annotations

import re
import sys
import tarfile
from dataclasses import dataclass
from enum import Enum
from typing import IO, TYPE_CHECKING, Self, cast

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import RawIOBase

_NS = 1_000_000_000
_XATTR_PREFIX = "SCHILY.xattr."
# What other readers of container layers allow for one pax or long name header.
_MAX_HEADER_SIZE = 1 << 20
# All of one member's headers together, maps of sparse files included.
_MAX_HEADERS_SIZE = 8 << 20
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# A type that nobody uses: tarfile skips the data of types it does not know.
_IGNORED_TYPE = b"\x01"
_CHUNK = 1 << 20
_TIME = re.compile(r"(-?)(\d{1,18})(?:\.(\d*))?", re.ASCII)
# Bounds of signed 64-bit nanoseconds; times outside become 0, as containerd has it.
_MAX_TIME_NS = (1 << 63) - 1
# chown(2) takes the highest number to mean "leave as it is".
_MAX_ID = (1 << 32) - 2

_PARSE_ERRORS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, EOFError, MemoryError)


class Kind(Enum):
    """What a member makes."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"
    CHARACTER = "character device"
    BLOCK = "block device"
    FIFO = "fifo"


_KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.CONTTYPE: Kind.FILE,
    tarfile.GNUTYPE_SPARSE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.CHRTYPE: Kind.CHARACTER,
    tarfile.BLKTYPE: Kind.BLOCK,
    tarfile.FIFOTYPE: Kind.FIFO,
}


@dataclass(frozen=True, slots=True)
class Member:
    """One member. Names are bytes as written, not yet checked for where they lead."""

    name: bytes
    kind: Kind
    #: Permission bits with setuid, setgid and sticky.
    mode: int
    uid: int
    gid: int
    #: Bytes of a file.
    size: int
    mtime_ns: int
    atime_ns: int
    link: bytes
    #: (major, minor)
    rdev: tuple[int, int]
    xattrs: tuple[tuple[bytes, bytes], ...]
    #: Where the member's header stands in the uncompressed stream.
    offset: int
    sparse: bool


class TarStream:
    """Iterates over the members of a tar that comes from ``file`` (unseekable, binary).

    ``blob`` is what errors call it. Everything wrong with the stream is a FormatError with the offset.
    """

    def __init__(self, file: IO[bytes] | RawIOBase, blob: str) -> None:
        self._stream = _ForwardReader(file)
        self._blob = blob
        self._tar: tarfile.TarFile | None = None
        self._current: tarfile.TarInfo | None = None

    def __iter__(self) -> Iterator[Member]:
        while (info := self._next()) is not None:
            self._current = info
            if info.type != _IGNORED_TYPE:
                yield self._member(info)

    def data(self, member: Member) -> Iterator[tuple[int, memoryview]]:
        """Yield the current file's bytes: offset in the file, and a piece of up to 1 MiB, valid until the next.

        A sparse file has holes where no piece comes. Raises FormatError if the stream ends first.
        """
        info = cast("tarfile.TarInfo", self._current)
        self._stream.seek(info.offset_data)
        for offset, length in self._extents(info, member):
            end = offset + length
            while offset < end:
                piece = self._stream.read_some(min(end - offset, _CHUNK))
                if not piece:
                    raise self._error("tar ends inside a file", got=offset, wanted=end)
                yield offset, piece
                offset += len(piece)

    def drain(self) -> None:
        """Read what follows the end of the archive, so that the writer of a pipe is not cut off."""
        while self._stream.read_some(_CHUNK):
            pass

    def _next(self) -> tarfile.TarInfo | None:
        self._stream.allow_reading(_MAX_HEADERS_SIZE)
        try:
            if self._tar is None:
                # tarfile reads the first member when it is opened.
                self._tar = tarfile.TarFile(
                    fileobj=cast("IO[bytes]", self._stream),
                    mode="r",
                    tarinfo=_CheckedInfo,
                    encoding="utf-8",
                    errors="surrogateescape",
                )
            found = self._tar.next()
            # It also keeps every member it has met.
            self._tar.members = []  # type: ignore[attr-defined]
        except tarfile.ReadError as error:
            if self._tar is None and self._stream.tell() == 0:
                return None  # no bytes at all: a layer without members
            raise self._error(f"not a tar or a damaged one: {error}") from error
        except _PARSE_ERRORS as error:
            raise self._error(f"not a tar or a damaged one: {error}") from error
        if found is not None and not cast("_CheckedInfo", found).is_checked:
            raise self._error(f"tar headers cannot be checked with this Python ({sys.version.split()[0]})")
        return found

    def _extents(self, info: tarfile.TarInfo, member: Member) -> list[tuple[int, int]]:
        # Where the file's stored bytes belong. tarfile takes the map of a sparse file as it comes.
        if not member.sparse:
            return [(0, member.size)]
        extents = cast("list[tuple[int, int]]", info.sparse)
        for offset, length in extents:
            if offset < 0 or length < 0 or offset + length > member.size:
                raise self._error("sparse file has data outside", got=(offset, length), wanted=member.size)
        return extents

    def _member(self, info: tarfile.TarInfo) -> Member:
        kind = _KINDS.get(info.type)
        if kind is None:
            raise self._error(f"member {info.name!r} has an unknown type", got=info.type, wanted="file, link or node")
        pax = info.pax_headers
        mtime_ns = _time_ns(pax.get("mtime"), info.mtime)
        member = Member(
            name=_raw(info.name),
            kind=kind,
            mode=info.mode & 0o7777,
            uid=info.uid,
            gid=info.gid,
            size=info.size if kind is Kind.FILE else 0,
            mtime_ns=mtime_ns,
            atime_ns=max(_time_ns(pax.get("atime"), 0), mtime_ns),
            link=_raw(info.linkname),
            rdev=(info.devmajor, info.devminor),
            xattrs=tuple(
                (_raw(key.removeprefix(_XATTR_PREFIX)), _raw(value))
                for key, value in pax.items()
                if key.startswith(_XATTR_PREFIX)
            ),
            offset=info.offset,
            sparse=info.issparse(),
        )
        self._check(member)
        return member

    def _check(self, member: Member) -> None:
        name = member.name.decode(errors="backslashreplace")
        if b"\0" in member.name or b"\0" in member.link:
            raise self._error(f"member {name!r} has a NUL in its name or link")
        if not (0 <= member.uid <= _MAX_ID and 0 <= member.gid <= _MAX_ID):
            raise self._error(f"member {name!r} has an owner out of range", got=f"{member.uid}:{member.gid}")
        if member.size < 0:
            raise self._error(f"member {name!r} has a negative size", got=member.size)
        major, minor = member.rdev
        if member.kind in (Kind.CHARACTER, Kind.BLOCK) and not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise self._error(f"member {name!r} has a device number out of range", got=f"{major}:{minor}")
        if any(not key or b"\0" in key for key, _ in member.xattrs):
            raise self._error(f"member {name!r} has an extended attribute without a proper name")

    def _error(self, what: str, *, got: object = None, wanted: object = None) -> FormatError:
        return FormatError(what, blob=self._blob, offset=self._stream.tell(), got=got, wanted=wanted)


class _CheckedInfo(tarfile.TarInfo):
    # tarfile takes an invalid header that is not the first for the end of the archive. Errors of another class than
    # HeaderError pass through it.

    #: Set by the check: tells that this Python's tarfile came by here.
    is_checked = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        return cls._checked(lambda: super(_CheckedInfo, cls).frombuf(buf, encoding, errors))

    # Where releases of 2026 parse headers (3.13.5 of Debian 13 among them); others have no such method.
    @classmethod
    def _frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str, **options: bool) -> Self:
        parse = super()._frombuf  # type: ignore[misc]
        return cls._checked(lambda: parse(buf, encoding, errors, **options))

    # A pax record may bring the wrong value, a negative size above all.
    def _proc_member(self, tar: tarfile.TarFile) -> Self:
        try:
            found: Self = super()._proc_member(tar)  # type: ignore[misc]
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.StreamError(str(error)) from error
        return found

    @classmethod
    def _checked(cls, parse: Callable[[], Self]) -> Self:
        try:
            info = parse()
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.StreamError(str(error)) from error
        if info.size < 0:
            raise tarfile.StreamError(f"negative size {info.size}")
        if info.type in _HEADER_TYPES and info.size > _MAX_HEADER_SIZE:
            raise tarfile.StreamError(f"extended header of {info.size} bytes, at most {_MAX_HEADER_SIZE} are allowed")
        if info.type == tarfile.XGLTYPE:
            info.type = _IGNORED_TYPE
        info.is_checked = True
        return info


class _ForwardReader:
    # The part of a file that tarfile needs, over a pipe: seek goes forwards only. Beyond what `r|` mode offers, it
    # hands out large pieces without copying them.

    def __init__(self, file: IO[bytes] | RawIOBase) -> None:
        self._file = file
        self._buffer = memoryview(bytearray(_CHUNK))
        self._begin = 0
        self._end = 0
        self._position = 0
        self._allowed = 0

    def allow_reading(self, size: int) -> None:
        # tarfile reads headers only, and takes what they say of their number and of a sparse file's map as it comes.
        self._allowed = size

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise tarfile.StreamError(f"an offset points backwards (to {position} from {self._position})")
        while self._position < position:
            if not self.read_some(min(position - self._position, _CHUNK)):
                raise EOFError(f"the stream ends at {self._position}, before {position}")
        return self._position

    def read(self, size: int) -> bytes:
        self._allowed -= size
        if self._allowed < 0:
            raise tarfile.StreamError(f"headers of one member are longer than {_MAX_HEADERS_SIZE} bytes")
        parts = []
        while size > 0 and (piece := self.read_some(min(size, _CHUNK))):
            parts.append(bytes(piece))
            size -= len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_some(self, size: int) -> memoryview:
        if self._begin == self._end:
            self._begin = 0
            self._end = self._file.readinto(self._buffer) or 0  # type: ignore[union-attr]
        piece = self._buffer[self._begin : min(self._begin + size, self._end)]
        self._begin += len(piece)
        self._position += len(piece)
        return piece


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _time_ns(text: str | None, seconds: float) -> int:
    # Text of a pax record, else the header's whole seconds. tarfile's own float would lose nanoseconds.
    match = _TIME.fullmatch(text) if text is not None else None
    if match is None:
        whole, fraction, negative = (int(seconds), "", False) if text is None else (0, "", False)
    else:
        whole, fraction, negative = int(match[2]), match[3] or "", bool(match[1])
    value = whole * _NS + int(fraction[:9].ljust(9, "0"))
    return value if not negative and 0 <= value <= _MAX_TIME_NS else 0
