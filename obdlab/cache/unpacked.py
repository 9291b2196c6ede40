"""Disks unpacked to plain files in the cache directory, which the kernel reads directly.

``<cache dir>/graduated/<name>/disk`` is a sparse file of the disk's size; ``sums`` beside it has a CRC32C for each
MiB of it. ``disk`` appears by a rename after both are on stable storage, so it is whole when it exists, and is never
written again. Each user keeps a shared lock (flock) on its open file, and a loop device keeps that file open: a disk
without a lock is unused, and the eviction removes the least recently used ones when the cache needs room.

``checked`` names the boot in which all of the disk matched its sums, and the version of the file that did. It is
written at each use, so its time is that of the last one.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from struct import Struct
from typing import TYPE_CHECKING

from obdlab.errors import CorruptBlobError, ObdlabError
from obdlab.formats.checksum import raw_crc32c
from obdlab.system.boot import boot_id
from obdlab.system.locks import directory_locked, try_lock
from obdlab.system.ownfiles import open_own
from obdlab.system.pauses import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obdlab.cache.space import CacheSpace

logger = logging.getLogger(__name__)

#: Bytes that one sum covers, and the most that is written at a time.
PIECE = 1 << 20
_HOLE = 64 << 10  # zeros of this length and alignment take no space
_ZEROS = bytes(PIECE)
_SYNC_EVERY = 32 << 20
_SUMS = Struct("<8sQ")  # magic, size of the disk; then a u32 for each piece
_SUM = Struct("<I")
_MAGIC = b"OBDLFLAT"
_CHECKED = "checked"
_MOST_NOTED = 4096
# Enough to estimate the rate of a disk.
_PROBE = 64 << 20
_LOOKED_AT_S = 2.0
_TRIES = 40
#: Errors of the process or the host, and not of the file that was to be opened.
_OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_LOCK_PAUSE_S = 0.05
# Longest wait for another process that stores the same disk.
_LONGEST_WAIT_S = 3600.0


class FlatFileError(ObdlabError, code="flat-file"):
    """An unpacked disk cannot be stored, or not yet."""


class FlatFiles:
    """The unpacked disks of one cache directory."""

    def __init__(self, space: CacheSpace) -> None:
        self._space = space
        self._directory = space.directory / "graduated"

    def path(self, name: str) -> Path:
        """Return the path of the disk of this name."""
        return self._directory / name / "disk"

    def open(self, name: str) -> int | None:
        """Open a disk; it stays in use until the descriptor and its copies are closed. None if it is missing.

        Raises FlatFileError if the system refuses.
        """
        try:
            self._space.check_owner()
            fd = open_own(self.path(name), os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FlatFileError(f"{self.path(name)}: cannot open: {error.strerror}") from error
        try:
            # Another process that looks whether it is in use, or removes it, has it locked for a moment.
            if (
                wait_until(partial(try_lock, fd, shared=True), _LOOKED_AT_S, look_s=_LOCK_PAUSE_S)
                and os.fstat(fd).st_nlink
            ):
                return fd
        except OSError as error:
            os.close(fd)
            raise FlatFileError(f"{self.path(name)}: cannot lock: {error.strerror}") from error
        os.close(fd)
        return None

    def take_into_use(self, name: str, longest_s: float = math.inf) -> int | None:
        """Open a disk as :meth:`open`, and check all of it if that was not done in this boot yet.

        None also if it was damaged, and so was removed. Raises FlatFileError, also if the check would take longer
        than ``longest_s``.
        """
        fd = self.open(name)
        if fd is None:
            return None
        kept = False
        try:
            checked = f"{boot_id()} {_version(fd)}\n".encode()
            if self._noted(name) != checked:
                self.check(name, fd, longest_s)
            self._note(name, checked)
            kept = True
            return fd
        except CorruptBlobError as error:
            logger.error("%s: removed", error)
            self.remove(name)
            return None
        except OSError as error:
            raise FlatFileError(f"{self.path(name)}: cannot read: {error.strerror}") from error
        finally:
            if not kept:
                os.close(fd)

    def check(self, name: str, fd: int, longest_s: float = math.inf) -> None:
        """Read all of a disk and compare it with its sums.

        Raises CorruptBlobError if it is damaged, and FlatFileError if this would take longer than ``longest_s``.
        """
        path = self.path(name)
        size = os.fstat(fd).st_size
        try:
            sums = path.with_name("sums").read_bytes()
        except OSError as error:
            if error.errno in _OF_THE_PROCESS:
                raise
            raise CorruptBlobError(f"its sums cannot be read ({error.strerror})", blob=str(path)) from error
        pieces = -(-size // PIECE)
        if len(sums) != _SUMS.size + pieces * _SUM.size or _SUMS.unpack_from(sums) != (_MAGIC, size):
            raise CorruptBlobError("its sums are not those of a disk of this size", blob=str(path), got=size)
        patience = _Patience(longest_s, 512 * os.fstat(fd).st_blocks)
        data_at = -1
        for number, (wanted,) in enumerate(_SUM.iter_unpack(sums[_SUMS.size :])):
            at = number * PIECE
            length = min(PIECE, size - at)
            if data_at < at:
                data_at = _next_data(fd, at, size)
            if data_at >= at + length:
                found = _zeros_sum(length)
            else:
                data = _read(fd, length, at, path)
                found = raw_crc32c(data) if len(data) == length else -1
                os.posix_fadvise(fd, at, length, os.POSIX_FADV_DONTNEED)
                if not patience.lasts(length):
                    raise FlatFileError(f"{path}: checking it would take longer than {longest_s:g} s")
            if found != wanted:
                raise CorruptBlobError("wrong checksum", blob=str(path), offset=at)

    def store(self, name: str, size: int, data_size: int, read: Callable[[int, int], bytes | None]) -> None:
        """Store a disk of ``size`` bytes, at most ``data_size`` of data, by ``read(offset, length)`` (None: zeros).

        Waits for another process that stores the same disk. Raises FlatFileError if there is no room within the
        cache's limits or the system refuses, and the errors of ``read``; then nothing is left.
        """
        directory = self.path(name).parent
        try:
            with self._space.changing(directory, patient=True):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _sole_writer(directory):
                if not self.path(name).exists():
                    self._remove_half_made(directory)
                    self._check_room(data_size)
                    self._store(directory, size, read)
        except OSError as error:
            raise FlatFileError(f"{self.path(name)}: cannot be stored: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Remove a disk; the kernel keeps it for its users. Raises FlatFileError."""
        try:
            _remove(self._space, self.path(name).parent)
        except OSError as error:
            raise FlatFileError(f"{self.path(name)}: cannot be removed: {error.strerror}") from error

    def _noted(self, name: str) -> bytes:
        try:
            with open(open_own(self.path(name).with_name(_CHECKED), os.O_RDONLY), "rb") as file:
                return file.read(_MOST_NOTED)
        except OSError:
            return b""

    # Without the note the disk is checked again, and seems unused for longer than it is.
    def _note(self, name: str, text: bytes) -> None:
        path = self.path(name).with_name(_CHECKED)
        with suppress(OSError), self._space.changing(path.parent, len(text)):
            fd = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                os.write(fd, text)
            finally:
                os.close(fd)

    def _check_room(self, wanted: int) -> None:
        room = self._space.make_room(wanted)
        if wanted > room:
            raise FlatFileError(
                f"{self._directory}: no room for an unpacked image (wanted up to {wanted >> 20} MiB, got "
                f"{room >> 20} MiB: cache_quota and cache_min_free limit the cache)"
            )

    # A killed process left it. Its bytes count, and would take the room of the new one.
    def _remove_half_made(self, directory: Path) -> None:
        new = directory / "disk.new"
        if new.exists():
            with self._space.changing(directory, patient=True):
                new.unlink(missing_ok=True)

    def _store(self, directory: Path, size: int, read: Callable[[int, int], bytes | None]) -> None:
        new, sums_path = directory / "disk.new", directory / "sums"
        try:
            with _opened(new) as fd:
                os.truncate(fd, size)
                sums = bytearray(_SUMS.pack(_MAGIC, size))
                unsynced = 0
                for at in range(0, size, PIECE):
                    length = min(PIECE, size - at)
                    data = read(at, length)
                    sums += _SUM.pack(_zeros_sum(length) if data is None else raw_crc32c(data))
                    if data is not None:
                        unsynced += self._write(fd, at, data)
                    if unsynced >= _SYNC_EVERY:
                        unsynced = 0
                        _write_out(fd)
                _write_out(fd)
            with self._space.changing(directory, len(sums), patient=True), _opened(sums_path) as fd:
                os.write(fd, sums)
                os.fsync(fd)
            os.rename(new, directory / "disk")
            _sync_directory(directory)
            _sync_directory(directory.parent)
        except BaseException:
            self._remove_half_made(directory)
            raise

    def _write(self, fd: int, at: int, data: bytes) -> int:
        view, written = memoryview(data), 0
        parts = [(start, view[start : start + _HOLE]) for start in range(0, len(view), _HOLE)]
        parts = [(start, part) for start, part in parts if part != _ZEROS[: len(part)]]
        if parts:
            with self._room(fd, len(parts) * _HOLE):
                written = sum(os.pwrite(fd, part, at + start) for start, part in parts)
            if written != sum(len(part) for _, part in parts):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    # A store or an eviction may hold the lock for a moment.
    @contextmanager
    def _room(self, fd: int, length: int) -> Iterator[None]:
        with ExitStack() as held:
            for left in range(_TRIES, -1, -1):
                try:
                    held.enter_context(self._space.room(fd, length))
                    break
                except TimeoutError:
                    if not left:
                        raise
            yield


class _Patience:
    # Of a reader of ``total`` bytes that must not take longer than ``longest_s``.
    def __init__(self, longest_s: float, total: int) -> None:
        self._longest_s = longest_s
        self._total = total
        self._read = 0
        self._began = time.monotonic()

    def lasts(self, length: int) -> bool:
        self._read += length
        took_s = time.monotonic() - self._began
        if self._read >= _PROBE:
            took_s *= max(1.0, self._total / self._read)
        return took_s <= self._longest_s


def _read(fd: int, length: int, at: int, path: Path) -> bytes:
    try:
        return os.pread(fd, length, at)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CorruptBlobError("cannot be read", blob=str(path), offset=at) from error


def _version(fd: int) -> str:
    found = os.fstat(fd)
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _next_data(fd: int, at: int, size: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else at  # else the file system does not know


@cache
def _zeros_sum(length: int) -> int:
    return raw_crc32c(_ZEROS[:length])


def directories_of(space: CacheSpace) -> list[Path]:
    """Return the directories of all disks, half-made ones too, sorted by name."""
    return sorted(path for path in (space.directory / "graduated").glob("*") if path.is_dir())


def last_use(directory: Path) -> float:
    """Return the time at which the disk in ``directory`` was last taken into use (seconds since 1970); 0 if never."""
    for name in (_CHECKED, "disk"):
        with suppress(OSError):
            return (directory / name).lstat().st_mtime
    return 0.0


@dataclass(frozen=True, slots=True)
class FlatFile:
    """One disk. Sizes in bytes; ``size`` is 0 if it is not whole. Times in seconds since 1970."""

    name: str
    size: int
    disk_bytes: int
    last_use: float
    in_use: bool


def entry_of(directory: Path) -> FlatFile | None:
    """Return the disk in ``directory``; None if it was removed meanwhile, or could not be stored."""
    try:
        sizes = [512 * path.lstat().st_blocks for path in directory.iterdir()]
        disk = directory / "disk"
        size = disk.lstat().st_size if disk.exists() else 0
    except FileNotFoundError:
        return None
    if not sizes:
        return None
    with _sole_user(directory) as unused:
        return FlatFile(directory.name, size, sum(sizes), last_use(directory), not unused)


def remove_unused(space: CacheSpace, *, half_made_only: bool = False) -> int:
    """Remove all unused disks, or the half-made ones; return the bytes freed. Raises OSError."""
    freed = 0
    for directory in directories_of(space):
        if not (half_made_only and (directory / "disk").exists()):
            freed += remove_if_unused(space, directory)
    return freed


def remove_if_unused(space: CacheSpace, directory: Path) -> int:
    """Remove the disk in ``directory`` unless it is in use or being made; return the bytes freed. Raises OSError."""
    with _sole_user(directory) as unused:
        try:
            return _remove(space, directory) if unused else 0
        except FileNotFoundError:  # another process was faster
            return 0


# Yields True if the disk is neither being made nor in use; no process can begin either meanwhile.
@contextmanager
def _sole_user(directory: Path) -> Iterator[bool]:
    with ExitStack() as held:
        for path, flags in ((directory, os.O_DIRECTORY), (directory / "disk", 0)):
            if path == directory or path.exists():
                fd = _try_lock(path, os.O_RDONLY | flags)
                if fd is None:
                    yield False
                    return
                held.callback(os.close, fd)
        yield True


def _remove(space: CacheSpace, directory: Path) -> int:
    with space.changing(directory, patient=True):
        freed = 0
        for path in sorted(directory.iterdir()):  # "disk" before "sums"
            freed += 512 * path.lstat().st_blocks
            path.unlink(missing_ok=True)
        directory.rmdir()
    return freed


def _try_lock(path: Path, flags: int) -> int | None:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError:
        return None
    with suppress(OSError):
        if try_lock(fd):
            return fd
    os.close(fd)
    return None


@contextmanager
def _sole_writer(directory: Path) -> Iterator[None]:
    with directory_locked(directory, _LONGEST_WAIT_S, longest_pause_s=_LOCK_PAUSE_S) as is_alone:
        if not is_alone:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process unpacks it", str(directory))
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


# Drops written data from the page cache: the loop device reads around it.
def _write_out(fd: int) -> None:
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
