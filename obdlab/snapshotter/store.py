"""The snapshotter's metadata, in SQLite: one row for each snapshot, one transaction around every change.

A committed id is never used again: directories and devices are named after ids.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    HasChildrenError,
    InvalidArgumentError,
    NotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 10.0
#: Longest key, in characters; containerd's own store accepts as many bytes.
_MAX_KEY = 32768
_MAX_LABELS = 256 << 10
_SCHEMA = """
CREATE TABLE snapshot (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    key        TEXT NOT NULL UNIQUE CHECK (key <> ''),
    parent_id  INTEGER REFERENCES snapshot (id) ON DELETE RESTRICT,
    kind       INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
    labels     TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    inodes     INTEGER NOT NULL DEFAULT 0,
    size       INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX snapshot_parent ON snapshot (parent_id);
"""
_COLUMNS = (
    "s.id, s.key, coalesce(p.key, ''), s.kind, s.labels, s.created_ns, s.updated_ns, s.inodes, s.size"
    " FROM snapshot s LEFT JOIN snapshot p ON p.id = s.parent_id"
)
_CHAIN = """
WITH RECURSIVE chain (id, parent_id, depth) AS (
    SELECT id, parent_id, 0 FROM snapshot WHERE key = ?
    UNION ALL
    SELECT s.id, s.parent_id, depth + 1 FROM snapshot s JOIN chain c ON s.id = c.parent_id
) SELECT id FROM chain ORDER BY depth
"""
_CONTAINERS = """
WITH RECURSIVE above (id, kind) AS (
    SELECT id, kind FROM snapshot WHERE parent_id = ?
    UNION ALL
    SELECT s.id, s.kind FROM snapshot s JOIN above a ON s.parent_id = a.id
) SELECT 1 FROM above WHERE kind <> 3 LIMIT 1
"""


class Kind(IntEnum):
    """The kind of a snapshot; the numbers are those of containerd's API."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk space of a snapshot itself, without its parents. ``size`` in bytes."""

    inodes: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot. ``parent`` is a key, or empty; times are nanoseconds since 1970."""

    id: int
    key: str
    parent: str
    kind: Kind
    labels: Mapping[str, str]
    created_ns: int
    updated_ns: int
    usage: Usage


class StoreError(ObdlabError):
    """The metadata file cannot be used: damaged, locked by another process, or of a newer version."""


class Reader:
    """Queries on one consistent state of the store."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, key: str) -> Snapshot:
        """Return the snapshot of that key. Raises NotFoundError."""
        found = self.find(key)
        if found is None:
            raise NotFoundError(f"snapshot {key!r} does not exist")
        return found

    def find(self, key: str) -> Snapshot | None:
        """Return the snapshot of that key, or None."""
        row = self._connection.execute(f"SELECT {_COLUMNS} WHERE s.key = ?", (key,)).fetchone()
        return None if row is None else _snapshot(row)

    def by_id(self, snapshot_id: int) -> Snapshot:
        """Return the snapshot of that id. Raises NotFoundError."""
        row = self._connection.execute(f"SELECT {_COLUMNS} WHERE s.id = ?", (snapshot_id,)).fetchone()
        if row is None:
            raise NotFoundError(f"snapshot number {snapshot_id} does not exist")
        return _snapshot(row)

    def chain(self, key: str) -> tuple[int, ...]:
        """Return the ids of the snapshot and its ancestors, nearest first. Raises NotFoundError."""
        ids = tuple(row[0] for row in self._connection.execute(_CHAIN, (key,)))
        if not ids:
            raise NotFoundError(f"snapshot {key!r} does not exist")
        return ids

    def count_children(self, snapshot_id: int) -> int:
        """Return how many snapshots build directly on this one."""
        query = "SELECT count(*) FROM snapshot WHERE parent_id = ?"
        return int(self._connection.execute(query, (snapshot_id,)).fetchone()[0])

    def has_containers(self, snapshot_id: int) -> bool:
        """Return True if an active snapshot or a view lies on this one, directly or on layers between."""
        return self._connection.execute(_CONTAINERS, (snapshot_id,)).fetchone() is not None

    def counts(self) -> dict[Kind, int]:
        """Return how many snapshots there are of each kind."""
        rows = self._connection.execute("SELECT kind, count(*) FROM snapshot GROUP BY kind")
        return dict.fromkeys(Kind, 0) | {Kind(kind): number for kind, number in rows}

    def all(self) -> list[Snapshot]:
        """Return all snapshots, oldest first."""
        return [_snapshot(row) for row in self._connection.execute(f"SELECT {_COLUMNS} ORDER BY s.id")]

    def ids(self) -> set[int]:
        """Return the ids of all snapshots."""
        return {row[0] for row in self._connection.execute("SELECT id FROM snapshot")}


class Writer(Reader):
    """Changes to the store; they take effect together when the transaction ends without an error."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        self._undo: list[Callable[[], None]] = []

    def on_rollback(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` if the transaction fails, for changes that SQLite cannot roll back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Call the functions registered by :meth:`on_rollback`, last first; logs those that fail."""
        while self._undo:
            try:
                self._undo.pop()()
            except (ObdlabError, OSError) as error:  # the others are as necessary, and the first error is reported
                logger.error("a failed change was not undone whole: %s", error)

    def create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> Snapshot:
        """Add an active snapshot or a view on top of a committed one (or of nothing).

        Raises InvalidArgumentError, NotFoundError (parent) or AlreadyExistsError.
        """
        if kind is Kind.COMMITTED:
            raise InvalidArgumentError(f"snapshot {key!r}: new snapshots are active or views")
        if not key:
            raise InvalidArgumentError("a snapshot's key must not be empty")
        parent_id = None
        if parent:
            base = self.find(parent)
            if base is None:
                raise NotFoundError(f"parent snapshot {parent!r} of {key!r} does not exist")
            if base.kind is not Kind.COMMITTED:
                raise InvalidArgumentError(f"parent snapshot {parent!r} of {key!r} is not committed")
            parent_id = base.id
        self._require_free(key)
        now = time.time_ns()
        self._connection.execute(
            "INSERT INTO snapshot (key, parent_id, kind, labels, created_ns, updated_ns) VALUES (?, ?, ?, ?, ?, ?)",
            (key, parent_id, kind, _labels_text(labels), now, now),
        )
        return self.get(key)

    def commit(self, key: str, name: str, labels: Mapping[str, str], usage: Usage) -> Snapshot:
        """Turn an active snapshot into a committed one called ``name``, with these labels instead of its own.

        Raises InvalidArgumentError, NotFoundError, AlreadyExistsError or FailedPreconditionError (not active).
        """
        if not name:
            raise InvalidArgumentError(f"snapshot {key!r}: the name to commit it under must not be empty")
        self._require_free(name)
        snapshot = self.get(key)
        if snapshot.kind is not Kind.ACTIVE:
            raise FailedPreconditionError(f"snapshot {key!r} is not active (got {snapshot.kind.name.lower()})")
        now = time.time_ns()
        self._connection.execute(
            "UPDATE snapshot SET key = ?, kind = ?, labels = ?, created_ns = ?, updated_ns = ?, inodes = ?, size = ?"
            " WHERE id = ?",
            (name, Kind.COMMITTED, _labels_text(labels), now, now, usage.inodes, usage.size, snapshot.id),
        )
        return self.get(name)

    def remove(self, key: str) -> Snapshot:
        """Remove a snapshot's row and return it. Raises NotFoundError or FailedPreconditionError (children)."""
        snapshot = self.get(key)
        if self.count_children(snapshot.id):
            raise HasChildrenError(key)
        self._connection.execute("DELETE FROM snapshot WHERE id = ?", (snapshot.id,))
        return snapshot

    def restore(self, snapshots: Sequence[Snapshot], last_id: int) -> None:
        """Insert snapshots of another store into this new one, unchanged, parents first.

        New ids continue after ``last_id``.
        """
        ids: dict[str, int] = {}
        for each in snapshots:
            ids[each.key] = each.id
            self._connection.execute(
                "INSERT INTO snapshot (id, key, parent_id, kind, labels, created_ns, updated_ns, inodes, size)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(each.id, each.key, ids[each.parent] if each.parent else None, each.kind),
                    *(_labels_text(each.labels), each.created_ns, each.updated_ns),
                    *(each.usage.inodes, each.usage.size),
                ),
            )
        self._connection.execute("DELETE FROM sqlite_sequence WHERE name = 'snapshot'")
        self._connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('snapshot', ?)", (last_id,))

    def set_labels(self, key: str, labels: Mapping[str, str]) -> Snapshot:
        """Replace the labels of a snapshot; a label without a value is dropped. Raises NotFoundError."""
        snapshot = self.get(key)
        self._connection.execute(
            "UPDATE snapshot SET labels = ?, updated_ns = ? WHERE id = ?",
            (_labels_text(labels), time.time_ns(), snapshot.id),
        )
        return self.get(key)

    def _require_free(self, key: str) -> None:
        if len(key) > _MAX_KEY:
            raise InvalidArgumentError(f"key: too long (got {len(key)} characters, wanted at most {_MAX_KEY})")
        if self.find(key) is not None:
            raise AlreadyExistsError(f"snapshot {key!r} already exists")


class Store:
    """The metadata file. Several threads may use it; only one process at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises StoreError."""
        self._path = path
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        with ExitStack() as opened:
            try:
                self._writer = opened.enter_context(closing(_connect(path)))
                self._prepare_schema()
                self._reader = opened.enter_context(closing(_connect(path)))
            except sqlite3.Error as error:
                raise StoreError(f"{path}: not usable as snapshot metadata ({error})") from error
            opened.pop_all()

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """Begin a read transaction: queries see one consistent state. Readers and writers do not block each other."""
        with self._read_lock, self._transaction(self._reader, "BEGIN"):
            yield Reader(self._reader)

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """Begin a write transaction. An exception inside rolls it back. Writers wait for each other."""
        writer = Writer(self._writer)
        with self._write_lock:
            try:
                with self._transaction(self._writer, "BEGIN IMMEDIATE"):
                    yield writer
            except BaseException:
                writer.undo()
                raise

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def _transaction(self, connection: sqlite3.Connection, begin: str) -> Iterator[None]:
        try:
            connection.execute(begin)
            try:
                yield
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise StoreError(f"{self._path}: {error}") from error

    def _prepare_schema(self) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self._path}: written by a newer obdlab (got version {version}, wanted {SCHEMA_VERSION})"
            )
        if version == 0:
            self._writer.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _connect(path: Path) -> sqlite3.Connection:
    with ExitStack() as opened:
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        opened.enter_context(closing(connection))
        connection.execute("PRAGMA journal_mode = WAL")
        # As durable as containerd's own metadata, which would otherwise be ahead of ours after a power cut.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        opened.pop_all()
    return connection


# List sends several snapshots in one message: a snapshot too large for it would hide all from containerd.
def _labels_text(labels: Mapping[str, str]) -> str:
    text = json.dumps({key: value for key, value in labels.items() if value != ""}, sort_keys=True)
    if len(text) > _MAX_LABELS:
        raise InvalidArgumentError(f"labels: too many (got {len(text)} characters, wanted at most {_MAX_LABELS})")
    return text


def _snapshot(row: tuple[int, str, str, int, str, int, int, int, int]) -> Snapshot:
    snapshot_id, key, parent, kind, labels, created_ns, updated_ns, inodes, size = row
    try:
        known = json.loads(labels)
        return Snapshot(snapshot_id, key, parent, Kind(kind), known, created_ns, updated_ns, Usage(inodes, size))
    except (ValueError, TypeError) as error:
        raise StoreError(f"snapshot metadata: damaged row {snapshot_id} ({error})") from error
