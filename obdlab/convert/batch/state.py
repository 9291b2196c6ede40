"""Progress of a list of conversions, in one SQLite file beside it."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from obdlab.convert.batch.job import Outcome
from obdlab.errors import FormatError, ObdlabError, SourceError
from obdlab.system.locks import try_lock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from obdlab.convert.batch.job import Pair

_VERSION = 1
_BUSY_S = 10.0
_TABLES = """
CREATE TABLE IF NOT EXISTS run (version INTEGER NOT NULL, options TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS images (
  destination TEXT PRIMARY KEY, source TEXT NOT NULL, tries INTEGER NOT NULL, ended REAL NOT NULL,
  digest TEXT NOT NULL, layers INTEGER NOT NULL, source_size INTEGER NOT NULL, size INTEGER NOT NULL,
  seconds REAL NOT NULL, host TEXT NOT NULL, error TEXT NOT NULL, temporary INTEGER NOT NULL
);
"""
# The blob serves the line of a failure alone, and files of earlier versions have no column for it.
_OUTCOME = tuple(field.name for field in fields(Outcome) if field.name != "blob")
_SELECT = f"SELECT source, destination, tries, {', '.join(_OUTCOME)} FROM images"
_INSERT = (
    f"INSERT OR REPLACE INTO images (destination, source, tries, ended, {', '.join(_OUTCOME)}) "
    f"VALUES ({', '.join('?' * (4 + len(_OUTCOME)))})"
)


class BatchInUseError(ObdlabError):
    """Another run works on the same list."""


@dataclass(frozen=True, slots=True)
class Row:
    """State of one image of the list; without an outcome it has not been tried."""

    source: str
    destination: str
    tries: int = 0
    outcome: Outcome | None = None

    @property
    def state(self) -> str:
        """ "done", "failed" or "open"."""
        if self.outcome is None:
            return "open"
        return "failed" if self.outcome.error else "done"


class BatchState:
    """The state file, for one run at a time. A context manager.

    ``options`` describes the conversion: a run with other options would mix two kinds of images, and is refused
    unless ``restart``, which forgets all results. Raises BatchInUseError, SourceError if the file cannot be used,
    FormatError if it is another kind of file.
    """

    def __init__(self, path: Path, options: str, *, restart: bool = False) -> None:
        self._path = path
        self._lock = self._locked()
        try:
            self._open(options, restart)
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, sqlite3.DatabaseError):
                raise self._unusable(error) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        os.close(self._lock)

    def rows(self, pairs: Sequence[Pair]) -> list[Row]:
        """Return the state of each image of the list. An image whose source has changed counts as not tried."""
        found = {}
        for source, destination, tries, *values in self._query(_SELECT):
            outcome = Outcome(**dict(zip(_OUTCOME, values, strict=True)))
            found[source, destination] = Row(source, destination, tries, outcome)
        return [found.get((pair.source, pair.destination)) or Row(pair.source, pair.destination) for pair in pairs]

    def store(self, pair: Pair, outcome: Outcome, tries: int) -> None:
        """Store the outcome of an image; it is on the disk when this returns."""
        values = asdict(outcome)
        self._query(
            _INSERT,
            (pair.destination, pair.source, tries, time.time(), *(values[name] for name in _OUTCOME)),
        )

    def _locked(self) -> int:
        # A lock file of its own: closing any descriptor of the database would drop SQLite's locks.
        path = f"{self._path}-lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SourceError(f"cannot keep the state of the list: {error.strerror}", blob=path) from error
        if not try_lock(lock):
            os.close(lock)
            raise BatchInUseError(f"{self._path}: another run works on this list")
        return lock

    def _open(self, options: str, restart: bool) -> None:
        if restart:
            for name in (str(self._path), f"{self._path}-journal"):
                with suppress(FileNotFoundError):
                    os.unlink(name)
        self._connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
        try:
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_TABLES)
            found = self._connection.execute("SELECT version, options FROM run").fetchone()
            if found is None:
                self._connection.execute("INSERT INTO run VALUES (?, ?)", (_VERSION, options))
            elif found[0] != _VERSION:
                raise FormatError("state of another version", blob=str(self._path), got=found[0], wanted=_VERSION)
            elif found[1] != options:
                raise FormatError(
                    "the list was begun with other options (--restart converts all again)",
                    blob=str(self._path), got=options, wanted=found[1],
                )  # fmt: skip
        except BaseException:
            self._connection.close()
            raise

    def _query(self, text: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        try:
            with closing(self._connection.execute(text, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> SourceError:
        return SourceError(f"cannot keep the state of the list: {error}", blob=str(self._path))
