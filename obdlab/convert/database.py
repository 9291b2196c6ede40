"""Database of earlier conversions, so that nothing is converted twice.

Three tables. The key of a converted layer is its input (the OCI layer's chain ID), the options (their digest) and its
base (a digest of the converted layers below it), so that layers which only seem to fit by name are never stacked. The
key of a converted manifest is its original's digest and the options. The third table has the hash trees of converted
layers, by digest. All belong to a place: a repository on a registry, or a layout directory. A row is only a hint: its
reader checks the place before use.

The statements are plain SQL, for SQLite and for servers. Packages register servers as ``obdlab.databases``, under the
scheme of their URLs.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from obdlab import plugins
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

#: How long a transaction waits for another one.
BUSY_S = 30.0
_SERVERS = "obdlab.databases"
_SQLITE = "sqlite:"
# Most other repositories of a registry that are asked to share a layer.
_MOST_PLACES = 5
_LONGEST_NAME = 255

_TABLES = (
    """CREATE TABLE IF NOT EXISTS obdlab_layers (
        host VARCHAR(255) NOT NULL, repository VARCHAR(255) NOT NULL, chain_id VARCHAR(71) NOT NULL,
        options VARCHAR(64) NOT NULL, below VARCHAR(64) NOT NULL,
        digest VARCHAR(71) NOT NULL, size BIGINT NOT NULL, segments BIGINT NOT NULL, data_size BIGINT NOT NULL,
        PRIMARY KEY (host, repository, chain_id, options, below))""",
    """CREATE TABLE IF NOT EXISTS obdlab_manifests (
        host VARCHAR(255) NOT NULL, repository VARCHAR(255) NOT NULL, source_digest VARCHAR(71) NOT NULL,
        options VARCHAR(64) NOT NULL,
        digest VARCHAR(71) NOT NULL,
        PRIMARY KEY (host, repository, source_digest, options))""",
    """CREATE TABLE IF NOT EXISTS obdlab_trees (
        host VARCHAR(255) NOT NULL, repository VARCHAR(255) NOT NULL, digest VARCHAR(71) NOT NULL,
        tree VARCHAR(143) NOT NULL,
        PRIMARY KEY (host, repository, digest))""",
)
_FIND_LAYER = f"""SELECT repository, digest, size, segments, data_size FROM obdlab_layers
    WHERE host = :host AND chain_id = :chain_id AND options = :options AND below = :below
    ORDER BY CASE WHEN repository = :repository THEN 0 ELSE 1 END, repository LIMIT {_MOST_PLACES}"""
_ADD_LAYER = """INSERT INTO obdlab_layers
    (host, repository, chain_id, options, below, digest, size, segments, data_size)
    VALUES (:host, :repository, :chain_id, :options, :below, :digest, :size, :segments, :data_size)"""
_ADD_MANIFEST = """INSERT INTO obdlab_manifests (host, repository, source_digest, options, digest)
    VALUES (:host, :repository, :source_digest, :options, :digest)"""
_ADD_TREE = """INSERT INTO obdlab_trees (host, repository, digest, tree)
    VALUES (:host, :repository, :digest, :tree)"""
_TREE_AT = "host = :host AND repository = :repository AND digest = :digest"
_LAYER_AT = "host = :host AND repository = :repository AND chain_id = :chain_id AND options = :options"
_MANIFEST_AT = "host = :host AND repository = :repository AND source_digest = :source_digest AND options = :options"

Place = tuple[str, str]


class DatabaseError(ObdlabError):
    """The database of converted layers cannot be opened or reached."""


@dataclass(frozen=True, slots=True)
class LayerKey:
    """The inputs that determine a converted layer's bytes."""

    chain_id: str
    #: Digest of all options that affect layers.
    options: str
    #: stack_digest() of the converted layers below.
    below: str

    @property
    def name(self) -> str:
        """The key as one file name."""
        return options_digest(asdict(self))


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A converted layer: its blob and its measures. Sizes in bytes."""

    digest: str
    size: int
    segments: int
    data_size: int


class Backend(Protocol):
    """A database that runs transactions. Every method raises DatabaseError."""

    def run(self, statements: Sequence[str], values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """Run statements as one transaction; return the rows of the last one."""

    def close(self) -> None:
        """Close connections."""


class Database:
    """Record of converted layers and manifests. May be used from several threads and processes at once.

    Every method raises DatabaseError; :func:`open_database` makes one.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        for statement in _TABLES:
            backend.run([statement], {})

    def find_layer(self, place: Place, key: LayerKey) -> list[tuple[str, LayerRecord]]:
        """Return where the layer may be on the place's host: (repository, record), the place itself first."""
        host, repository = _cut(place)
        rows = self._backend.run([_FIND_LAYER], {"host": host, "repository": repository, **asdict(key)})
        return [(str(row[0]), LayerRecord(str(row[1]), int(row[2]), int(row[3]), int(row[4]))) for row in rows]

    def add_layer(self, place: Place, key: LayerKey, record: LayerRecord) -> None:
        """Record that the place has the layer, replacing an earlier record."""
        host, repository = _cut(place)
        self._backend.run(
            [
                f"DELETE FROM obdlab_layers WHERE {_LAYER_AT} AND below = :below",
                _ADD_LAYER,
            ],
            {"host": host, "repository": repository, **asdict(key), **asdict(record)},
        )

    def drop_layer(self, place: Place, key: LayerKey) -> None:
        """Delete the record of a layer that the place no longer has."""
        host, repository = _cut(place)
        self._backend.run(
            [f"DELETE FROM obdlab_layers WHERE {_LAYER_AT} AND below = :below"],
            {"host": host, "repository": repository, **asdict(key)},
        )

    def find_manifest(self, place: Place, source_digest: str, options: str) -> str | None:
        """Return the digest of the source's converted manifest, if recorded."""
        values = self._manifest(place, source_digest, options)
        rows = self._backend.run([f"SELECT digest FROM obdlab_manifests WHERE {_MANIFEST_AT}"], values)
        return str(rows[0][0]) if rows else None

    def add_manifest(self, place: Place, source_digest: str, options: str, digest: str) -> None:
        """Record the source's converted manifest, replacing an earlier record."""
        self._backend.run(
            [
                f"DELETE FROM obdlab_manifests WHERE {_MANIFEST_AT}",
                _ADD_MANIFEST,
            ],
            {**self._manifest(place, source_digest, options), "digest": digest},
        )

    def drop_manifest(self, place: Place, source_digest: str, options: str) -> None:
        """Delete the record of a manifest that the place no longer has."""
        values = self._manifest(place, source_digest, options)
        self._backend.run([f"DELETE FROM obdlab_manifests WHERE {_MANIFEST_AT}"], values)

    def find_tree(self, place: Place, digest: str) -> str | None:
        """Return the annotation's text for the hash tree of the layer ``digest``, if recorded."""
        host, repository = _cut(place)
        values = {"host": host, "repository": repository, "digest": digest}
        rows = self._backend.run([f"SELECT tree FROM obdlab_trees WHERE {_TREE_AT}"], values)
        return str(rows[0][0]) if rows else None

    def add_tree(self, place: Place, digest: str, tree: str) -> None:
        """Record the hash tree of a layer, replacing an earlier record."""
        host, repository = _cut(place)
        values = {"host": host, "repository": repository, "digest": digest, "tree": tree}
        self._backend.run([f"DELETE FROM obdlab_trees WHERE {_TREE_AT}", _ADD_TREE], values)

    def _manifest(self, place: Place, source_digest: str, options: str) -> dict[str, object]:
        host, repository = _cut(place)
        return {"host": host, "repository": repository, "source_digest": source_digest, "options": options}

    def close(self) -> None:
        """Close connections."""
        self._backend.close()


def open_database(url: str) -> Database:
    """Open the database at ``url``, making its tables if they are missing.

    A path (or ``sqlite:PATH``) is an SQLite file, made with its directory; ``SCHEME://...`` is a server. Raises
    DatabaseError.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return Database(_Sqlite(Path(url.removeprefix(_SQLITE)).expanduser()))
    server: Callable[[str], Backend] | None = plugins.load(_SERVERS, scheme)
    if server is None:
        wanted = "".join(f", {name}://..." for name in plugins.names(_SERVERS))
        raise DatabaseError(f"database: no such kind (got {scheme}://, wanted a path, sqlite:PATH{wanted})")
    return Database(server(url))


class _Sqlite:
    # One connection per transaction: connections belong to threads, and opening one costs less than a database saves.
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(f"{path}: cannot make the database's directory ({error.strerror})") from error

    def run(self, statements: Sequence[str], values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        try:
            # Waits for other writers.
            with closing(sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE" if len(statements) > 1 else "BEGIN")
                for statement in statements:
                    rows = connection.execute(statement, values).fetchall()
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise DatabaseError(f"{self._path}: database of converted layers: {error}") from error
        return rows

    def close(self) -> None:
        pass


@contextmanager
def opened(url: str) -> Iterator[Database | None]:
    """Open the database for the block; None without a URL. Raises DatabaseError."""
    if not url:
        yield None
        return
    database = open_database(url)
    try:
        yield database
    finally:
        database.close()


def options_digest(options: Mapping[str, object]) -> str:
    """Return 64 hex digits that identify a set of options."""
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()


def stack_digest(digests: Sequence[str]) -> str:
    """Return 64 hex digits that identify a stack of blobs, bottom first."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _cut(place: Place) -> Place:
    # Names of directories may be longer than the columns.
    host, repository = place
    if len(repository) > _LONGEST_NAME:
        repository = f"sha256:{hashlib.sha256(repository.encode(errors='surrogateescape')).hexdigest()}"
    return host, repository
