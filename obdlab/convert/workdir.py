"""Work directories of conversions: removed when the conversion ends, or, if it was killed, when the next one begins.

Finished layers of a killed conversion are kept for a day, so that the next one of the same image need not make them
again. They are in a directory beside the others, under names made of their keys (:class:`FinishedLayers`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.database import LayerRecord
from obdlab.convert.endpoints.layout import digest_of_file
from obdlab.errors import SourceError
from obdlab.records import known_fields
from obdlab.system.locks import try_lock
from obdlab.system.newfile import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_PREFIX = "obdlab-convert-"
_POOL = "obdlab-finished-"
_BLOB = ".layer"
_RECORD = ".json"
_KEPT_S = 24 * 3600
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_RECORD = 4096


@contextmanager
def work_directory(parent: Path) -> Iterator[Path]:
    """Make a directory below ``parent`` for this conversion, and remove it at the end of the block.

    First, directories of this user's killed conversions are removed, except for finished layers; directories in use
    are locked. Raises SourceError if ``parent`` cannot be used.
    """
    try:
        _sweep(parent)
        directory, lock = _make(parent)
    except OSError as error:
        raise SourceError(f"cannot make a work directory: {error.strerror}", blob=str(parent)) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
        with suppress(OSError):
            _pool(parent).rmdir()  # only if it is empty


class FinishedLayers:
    """Finished layers of the conversion in ``directory``, and those that killed conversions left beside it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = _pool(directory.parent)

    def add(self, name: str, path: Path, record: LayerRecord) -> None:
        """Record that ``path``, in the directory, is the finished layer ``name``.

        If that fails (a file system without hard links), a kill only costs the layer.
        """
        try:
            # The record is written last: only a complete layer has one.
            os.link(path, self._directory / f"{name}{_BLOB}")
            replace_file(self._directory / f"{name}{_RECORD}", json.dumps(asdict(record)).encode())
        except FileExistsError:
            pass  # the same layer twice in an image
        except OSError as error:
            logger.info("%s: would not survive a kill: %s", path, error.strerror)

    def take(self, name: str) -> tuple[Path, LayerRecord] | None:
        """Move the layer ``name`` of a killed conversion into the directory; return it if it exists and is whole."""
        blob, record = self._directory / f"{name}{_BLOB}", self._directory / f"{name}{_RECORD}"
        try:
            if not _is_own(self._pool):
                return None
            os.replace(self._pool / f"{name}{_RECORD}", record)
            os.replace(self._pool / f"{name}{_BLOB}", blob)
            found = LayerRecord(**known_fields(LayerRecord, json.loads(record.read_bytes()[:_MAX_RECORD])))
            digest = digest_of_file(blob)
            if (digest, blob.stat().st_size) == (found.digest, found.size):
                return blob, found
        except (OSError, ValueError, TypeError):  # gone, taken by another, or damaged: the layer is built
            pass
        for path in (blob, record):
            path.unlink(missing_ok=True)
        return None


def _pool(parent: Path) -> Path:
    return parent / f"{_POOL}{os.geteuid()}"


def _is_own(directory: Path) -> bool:
    # All users may be able to write to the parent.
    try:
        status = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Before it is locked, it looks like one of a killed conversion.
        with suppress(FileNotFoundError):
            lock = os.open(directory, _FLAGS)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if directory.exists():
                return directory, lock
            os.close(lock)


def _sweep(parent: Path) -> None:
    with os.scandir(parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(_PREFIX)]
    for name in names:
        # Errors skip a name that is not a directory, or is another user's.
        with suppress(OSError):
            _sweep_one(parent, parent / name)
    with suppress(OSError):
        _expire(_pool(parent))


def _sweep_one(parent: Path, directory: Path) -> None:
    lock = os.open(directory, _FLAGS)
    try:
        if os.fstat(lock).st_uid == os.geteuid() and try_lock(lock):
            _keep_finished(directory, _pool(parent))
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


def _keep_finished(directory: Path, pool: Path) -> None:
    for record in directory.glob(f"*{_RECORD}"):
        with suppress(FileExistsError):
            pool.mkdir(mode=0o700)
        if not _is_own(pool):
            return
        with suppress(OSError):  # another conversion was taking it
            os.replace(record.with_suffix(_BLOB), pool / record.with_suffix(_BLOB).name)
            os.replace(record, pool / record.name)


def _expire(pool: Path) -> None:
    if not _is_own(pool):
        return
    for path in pool.iterdir():
        if time.time() - path.stat().st_mtime > _KEPT_S:
            path.unlink()
    with suppress(OSError):
        pool.rmdir()
