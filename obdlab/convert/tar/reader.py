"""Members of an untrusted tar stream, read once, forwards.

The standard library's tarfile does the parsing (ustar, pax, GNU). This module adds checks for untrusted input: a
damaged header in the middle is an error instead of the end, header sizes are bounded, pax times keep their
nanoseconds, extended attributes their raw bytes, and global pax headers are ignored as containerd ignores them.

Sources: POSIX.1-2024 pax; GNU tar manual, "Basic Tar Format"; OCI image layer specification.
"""

from __future__ import annotations

import sys
import tarfile
from functools import partial
from typing import IO, TYPE_CHECKING, Self, cast

from obdlab.convert.tar.forward import MAX_HEADERS_SIZE, PIECE, ForwardReader
from obdlab.convert.tar.member import BLOCK, MAX_TIME_NS, Kind, Member, plain_member
from obdlab.convert.tar.pax import merged, parse_records, pax_size, time_ns
from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import RawIOBase

_NS = 1_000_000_000
_XATTR_PREFIX = "SCHILY.xattr."
# The limit that other readers of container layers have for one pax or long name header.
_MAX_HEADER_SIZE = 1 << 20
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_END = bytes(BLOCK)
# An unused type: tarfile skips the data of types it does not know.
_IGNORED_TYPE = b"\x01"
# The highest number means "leave as it is" to chown(2).
_MAX_ID = (1 << 32) - 2

_PARSE_ERRORS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, EOFError, MemoryError)

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


class TarStream:
    """Iterates over the members of a tar from ``file`` (unseekable, binary).

    ``blob`` is its name in errors. Every defect of the stream is a FormatError with the offset.
    """

    def __init__(self, file: IO[bytes] | RawIOBase, blob: str) -> None:
        self._stream = ForwardReader(file)
        self._blob = blob
        self._tar: tarfile.TarFile | None = None
        #: Offset of the next header.
        self._next = 0
        # The current member's stored bytes: their offset in the stream, and their extents in the file.
        self._data_at = 0
        self._extents: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[Member]:
        stream = self._stream
        while True:
            try:
                stream.seek(self._next)
            except (EOFError, tarfile.TarError) as error:
                raise self._error(f"not a tar or a damaged one: {error}") from error
            header = stream.peek(BLOCK)
            if not header or header == _END:
                return
            begin = self._next
            member = self._quickly(header) if len(header) == BLOCK else None
            if member is not None:
                member.offset, self._data_at = begin, self._next
                self._next = self._data_at + (member.size + BLOCK - 1) // BLOCK * BLOCK
                self._extents = [(0, member.size)]
                yield member
                continue
            info = self._parse()
            if info is None:
                return
            if info.type != _IGNORED_TYPE:
                member = self._member(info)
                self._data_at = info.offset_data
                self._extents = self._checked_extents(info, member)
                yield member

    def data(self, member: Member) -> Content:
        """Return the current file's bytes."""
        return Content(
            self._pieces(member), None if member.sparse else self._data_at, partial(self._is_padded, member)
        )

    def _is_padded(self, member: Member) -> bool:
        padding = -member.size % BLOCK
        self._stream.seek(self._data_at + member.size)
        return self._stream.peek(padding) == bytes(padding)

    def _pieces(self, member: Member) -> Iterator[tuple[int, memoryview]]:
        stream = self._stream
        stream.seek(self._data_at)
        for offset, length in self._extents:
            end = offset + length
            while offset < end:
                piece = stream.read_some(min(end - offset, PIECE))
                if not piece:
                    raise self._error("tar ends inside a file", got=offset, wanted=end)
                yield offset, piece
                offset += len(piece)

    def drain(self) -> None:
        """Read the rest after the end of the archive, so that the writer of a pipe does not fail."""
        while self._stream.read_some(PIECE):
            pass

    def _quickly(self, header: bytes) -> Member | None:
        # Returns the member at the current position if it can do without tarfile; its content then begins at _next.
        size = pax_size(header)
        if size is None or size > _MAX_HEADER_SIZE:
            member = plain_member(header, self._next)
            if member is not None:
                self._next += BLOCK
            return member
        length = BLOCK + -(-size // BLOCK) * BLOCK
        blocks = self._stream.peek(length + BLOCK)
        if len(blocks) < length + BLOCK:
            return None
        member = plain_member(blocks[length:], self._next)
        if member is not None:
            try:
                member = merged(member, parse_records(blocks[BLOCK : BLOCK + size]))
            except ValueError as error:
                raise self._error(f"damaged pax header: {error}") from error
        if member is not None:
            self._check(member)
            self._next += length + BLOCK
        return member

    def _parse(self) -> tarfile.TarInfo | None:
        # Returns the member at the current position, with its extension headers.
        self._stream.allow_reading(MAX_HEADERS_SIZE)
        try:
            if self._tar is None:
                # Opening reads the first member.
                self._tar = tarfile.TarFile(
                    fileobj=cast("IO[bytes]", self._stream),
                    mode="r",
                    tarinfo=_CheckedInfo,
                    encoding="utf-8",
                    errors="surrogateescape",
                )
                found = cast("tarfile.TarInfo | None", self._tar.firstmember)  # type: ignore[attr-defined]
                self._tar.firstmember = None  # type: ignore[attr-defined]
            else:
                self._tar.offset = self._next
                found = self._tar.next()
            self._next = self._tar.offset
            # tarfile keeps every member it has read.
            self._tar.members = []  # type: ignore[attr-defined]
        except _PARSE_ERRORS as error:
            raise self._error(f"not a tar or a damaged one: {error}") from error
        if found is not None and not cast("_CheckedInfo", found).is_checked:
            raise self._error(f"tar headers cannot be checked with this Python ({sys.version.split()[0]})")
        return found

    def _checked_extents(self, info: tarfile.TarInfo, member: Member) -> list[tuple[int, int]]:
        # Returns the places of the file's stored bytes. tarfile does not check the map of a sparse file.
        if not member.sparse:
            return [(0, member.size)]
        # Entries without bytes mean nothing: unused ones of GNU tar's old format are (0, 0), behind all others.
        extents = [extent for extent in cast("list[tuple[int, int]]", info.sparse) if extent[1]]
        end = 0
        for offset, length in extents:
            if length < 0 or not end <= offset <= member.size - length:
                what = "sparse file has data outside, or out of order"
                raise self._error(what, got=(offset, length), wanted=f"inside [{end}, {member.size})")
            end = offset + length
        return extents

    def _member(self, info: tarfile.TarInfo) -> Member:
        kind = _KINDS.get(info.type)
        if kind is None:
            raise self._error(f"member {info.name!r} has an unknown type", got=info.type, wanted="file, link or node")
        pax = info.pax_headers
        mtime_ns = time_ns(pax["mtime"]) if "mtime" in pax else _seconds_ns(int(info.mtime))
        member = Member(
            name=_raw(info.name),
            kind=kind,
            mode=info.mode & 0o7777,
            uid=info.uid,
            gid=info.gid,
            size=info.size if kind is Kind.FILE else 0,
            mtime_ns=mtime_ns,
            atime_ns=max(time_ns(pax.get("atime", "")), mtime_ns),
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


class Content:
    """The bytes of a file in a tar: iterating yields the offset in the file, and a piece of up to 1 MiB.

    A piece is valid until the next one. Ranges of a sparse file without a piece are holes. Raises FormatError if the
    stream ends first.
    """

    def __init__(
        self, pieces: Iterator[tuple[int, memoryview]], place: int | None, is_padded: Callable[[], bool]
    ) -> None:
        self._pieces = pieces
        self._is_padded = is_padded
        #: Offset of the bytes in the uncompressed tar, in whole sectors; None if they do not lie there in one piece.
        self.place = place

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        return self._pieces

    def is_padded(self) -> bool:
        """Return True if the last sector's rest is in the tar and zeros. To be called after the last piece."""
        return self._is_padded()


class _CheckedInfo(tarfile.TarInfo):
    # tarfile takes an invalid header after the first for the end of the archive. Only errors of classes other than
    # HeaderError pass through it.

    #: Set by the check, as proof that this Python's tarfile calls it.
    is_checked = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        return cls._checked(buf, lambda: super(_CheckedInfo, cls).frombuf(buf, encoding, errors))

    # Releases of 2026 parse headers here (3.13.5 of Debian 13 among them); others have no such method.
    @classmethod
    def _frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str, **options: bool) -> Self:
        parse = super()._frombuf  # type: ignore[misc]
        return cls._checked(buf, lambda: parse(buf, encoding, errors, **options))

    # tarfile would stop reading records at a damaged one.
    def _proc_pax(self, tar: tarfile.TarFile) -> Self:
        reader = cast("ForwardReader", tar.fileobj)
        try:
            parse_records(reader.peek(-(-self.size // BLOCK) * BLOCK)[: self.size])
        except ValueError as error:
            raise tarfile.StreamError(f"damaged pax header: {error}") from error
        found: Self = super()._proc_pax(tar)  # type: ignore[misc]
        return found

    # A pax record may bring a wrong value, such as a negative size.
    def _proc_member(self, tar: tarfile.TarFile) -> Self:
        try:
            found: Self = super()._proc_member(tar)  # type: ignore[misc]
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.StreamError(str(error)) from error
        return found

    @classmethod
    def _checked(cls, buf: bytes | bytearray, parse: Callable[[], Self]) -> Self:
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
        if buf[257:265] == tarfile.GNU_MAGIC and info.type not in tarfile.GNU_TYPES:
            # GNU tar keeps times where ustar has the front of a long name; tarfile would take them for a name.
            name = tarfile.nts(buf[:100], "utf-8", "surrogateescape")  # type: ignore[attr-defined]
            info.name = name.rstrip("/") if info.isdir() else name
        info.is_checked = True
        return info


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _seconds_ns(seconds: int) -> int:
    return seconds * _NS if 0 <= seconds * _NS <= MAX_TIME_NS else 0
