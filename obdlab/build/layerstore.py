"""The build cache: layers of earlier builds, found by the digest of all their inputs.

A key names everything that decides a step's result; its record names a layer blob. The least recently used layers go
when the cache is larger than it may be.
"""

from __future__ import annotations

import json
import os
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from obdlab.closing import Closing
from obdlab.errors import SourceError
from obdlab.formats.oci import is_digest
from obdlab.records import known_fields
from obdlab.system.locks import lock_until, try_lock
from obdlab.system.newfile import replace_file
from obdlab.system.ownfiles import check_own_directory

if TYPE_CHECKING:
    from pathlib import Path

_LOCK = "lock"
_RECORD = ".json"
_BLOB = ".obd"
_MOST_RECORD = 4096
_LOCKED_S = 60.0


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """A finished layer: its file, and the facts that a manifest has of it."""

    path: Path
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class _Record:
    digest: str = ""
    size: int = -1


class LayerStore(Closing):
    """The cache in ``directory``, which is made if it is missing and must be this user's alone.

    Several builds may use it at the same time. Raises SourceError if it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_own_directory(directory)
            self._lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SourceError(
                f"cannot be used as build cache: {error.strerror or error}", blob=str(directory)
            ) from error
        deadline = time.monotonic() + _LOCKED_S
        while not try_lock(self._lock, shared=True):  # another build removes old layers
            if time.monotonic() > deadline:
                os.close(self._lock)
                raise SourceError(f"build cache is locked for more than {_LOCKED_S:g} s", blob=str(directory))
            time.sleep(0.05)

    def close(self) -> None:
        """Let others remove layers."""
        os.close(self._lock)

    def find(self, key: str) -> LayerBlob | None:
        """Return the layer of a key; None if it is missing."""
        path = self.directory / f"{key}{_RECORD}"
        try:
            record = _Record(**known_fields(_Record, json.loads(path.read_bytes()[:_MOST_RECORD])))
            if not is_digest(record.digest):
                return None
            blob = self.path_of(record.digest)
            found = blob.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != record.size:
                return None
            os.utime(blob)
            os.utime(path)
        except (OSError, ValueError, TypeError):  # missing, or damaged: the step is run
            return None
        return LayerBlob(blob, record.digest, record.size)

    def new_path(self, name: str) -> Path:
        """Return a path in the directory for a file that is being made, to be given to :meth:`add`."""
        return self.directory / f".{os.getpid()}-{name}.partial"

    def add(self, key: str, made: Path, digest: str) -> LayerBlob:
        """Take over a finished layer's file, and record it under ``key`` ("": under none). Raises SourceError."""
        blob = self.path_of(digest)
        try:
            size = made.stat().st_size
            os.replace(made, blob)
            if key:
                record = json.dumps(asdict(_Record(digest, size))).encode()
                replace_file(self.directory / f"{key}{_RECORD}", record)
        except OSError as error:
            raise SourceError(f"cannot keep the layer: {error.strerror}", blob=str(blob)) from error
        return LayerBlob(blob, digest, size)

    def path_of(self, digest: str) -> Path:
        """Return the path of a layer's blob."""
        return self.directory / f"{digest.removeprefix('sha256:')}{_BLOB}"

    def prune(self, most: int) -> int:
        """Remove the least recently used layers until all have at most ``most`` bytes; return the bytes freed.

        Does nothing while another build uses the cache.
        """
        if not lock_until(self._lock, time.monotonic()):
            return 0
        freed = 0
        try:
            found = []
            for path in self.directory.iterdir():
                with suppress(OSError):
                    if path.name.endswith(".partial"):
                        path.unlink()  # of a killed build
                    elif path.suffix == _BLOB:
                        status = path.stat()
                        found.append((status.st_mtime, status.st_size, path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= most:
                    break
                with suppress(OSError):
                    path.unlink()
                    total, freed = total - size, freed + size
            for path in self.directory.glob(f"*{_RECORD}"):
                with suppress(OSError, ValueError, TypeError):
                    record = _Record(**known_fields(_Record, json.loads(path.read_bytes()[:_MOST_RECORD])))
                    if not is_digest(record.digest) or not self.path_of(record.digest).exists():
                        path.unlink()
        finally:
            try_lock(self._lock, shared=True)
        return freed
