"""What was converted before, and where it is: so that nothing is converted twice.

Two tables. A converted layer is known by what it was made of (the OCI layer's chain ID), how (a digest of the
options) and on what (a digest of the converted layers below it), so that layers which fit each other by name only are
never stacked. A converted manifest is known by its original's digest and the options. Both belong to a place: a
repository on a registry, a layout directory. What a row says is a hint: whoever uses it asks the place first.

The statements are plain SQL that SQLite, PostgreSQL and MySQL all take. SQLite needs nothing else; the others are
reached through SQLAlchemy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import sqlite3
import time
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from obdlab.command import install_command
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import sqlalchemy

logger = logging.getLogger(__name__)

_BUSY_S = 30.0
# How often one may be among those that a server chooses to end a deadlock by.
_DEADLOCKS = 20
_SERVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql"}
_SQLITE = "sqlite:"
# Other repositories of a registry that are asked to share a layer.
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
)
_FIND_LAYER = f"""SELECT repository, digest, size, segments, data_size FROM obdlab_layers
    WHERE host = :host AND chain_id = :chain_id AND options = :options AND below = :below
    ORDER BY CASE WHEN repository = :repository THEN 0 ELSE 1 END, repository LIMIT {_MOST_PLACES}"""
_ADD_LAYER = """INSERT INTO obdlab_layers
    (host, repository, chain_id, options, below, digest, size, segments, data_size)
    VALUES (:host, :repository, :chain_id, :options, :below, :digest, :size, :segments, :data_size)"""
_ADD_MANIFEST = """INSERT INTO obdlab_manifests (host, repository, source_digest, options, digest)
    VALUES (:host, :repository, :source_digest, :options, :digest)"""
_LAYER_AT = "host = :host AND repository = :repository AND chain_id = :chain_id AND options = :options"
_MANIFEST_AT = "host = :host AND repository = :repository AND source_digest = :source_digest AND options = :options"

Place = tuple[str, str]


class DatabaseError(ObdlabError):
    """The database of converted layers cannot be opened or reached."""


@dataclass(frozen=True, slots=True)
class LayerKey:
    """What decides a converted layer's bytes."""

    chain_id: str
    #: Digest of all options that layers depend on.
    options: str
    #: stack_digest() of the converted layers below.
    below: str

    @property
    def name(self) -> str:
        """The key as one file name."""
        return options_digest(asdict(self))


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A converted layer: its blob, and what is told of it. Sizes in bytes."""

    digest: str
    size: int
    segments: int
    data_size: int


class _Backend(Protocol):
    def run(self, statements: Sequence[str], values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """Run statements as one transaction; return the rows of the last one."""

    def close(self) -> None:
        """Close connections."""


class Database:
    """Layers and manifests that were converted before. May be used from several threads and processes at once.

    Every method raises DatabaseError; :func:`open_database` makes one.
    """

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend
        for statement in _TABLES:
            backend.run([statement], {})

    def find_layer(self, place: Place, key: LayerKey) -> list[tuple[str, LayerRecord]]:
        """Return where on the place's host the layer may be: (repository, record), the place itself first."""
        host, repository = _cut(place)
        rows = self._backend.run([_FIND_LAYER], {"host": host, "repository": repository, **asdict(key)})
        return [(str(row[0]), LayerRecord(str(row[1]), int(row[2]), int(row[3]), int(row[4]))) for row in rows]

    def add_layer(self, place: Place, key: LayerKey, record: LayerRecord) -> None:
        """Note that the place has the layer, in place of what was noted of it."""
        host, repository = _cut(place)
        self._backend.run(
            [
                f"DELETE FROM obdlab_layers WHERE {_LAYER_AT} AND below = :below",
                _ADD_LAYER,
            ],
            {"host": host, "repository": repository, **asdict(key), **asdict(record)},
        )

    def drop_layer(self, place: Place, key: LayerKey) -> None:
        """Forget a layer that the place has no more."""
        host, repository = _cut(place)
        self._backend.run(
            [f"DELETE FROM obdlab_layers WHERE {_LAYER_AT} AND below = :below"],
            {"host": host, "repository": repository, **asdict(key)},
        )

    def find_manifest(self, place: Place, source_digest: str, options: str) -> str | None:
        """Return the digest of the manifest that the source was converted to."""
        values = self._manifest(place, source_digest, options)
        rows = self._backend.run([f"SELECT digest FROM obdlab_manifests WHERE {_MANIFEST_AT}"], values)
        return str(rows[0][0]) if rows else None

    def add_manifest(self, place: Place, source_digest: str, options: str, digest: str) -> None:
        """Note what the source was converted to, in place of what was noted of it."""
        self._backend.run(
            [
                f"DELETE FROM obdlab_manifests WHERE {_MANIFEST_AT}",
                _ADD_MANIFEST,
            ],
            {**self._manifest(place, source_digest, options), "digest": digest},
        )

    def drop_manifest(self, place: Place, source_digest: str, options: str) -> None:
        """Forget a manifest that the place has no more."""
        values = self._manifest(place, source_digest, options)
        self._backend.run([f"DELETE FROM obdlab_manifests WHERE {_MANIFEST_AT}"], values)

    def _manifest(self, place: Place, source_digest: str, options: str) -> dict[str, object]:
        host, repository = _cut(place)
        return {"host": host, "repository": repository, "source_digest": source_digest, "options": options}

    def close(self) -> None:
        """Close connections."""
        self._backend.close()


def open_database(url: str) -> Database:
    """Open the database that ``url`` names, making its tables if need be.

    A path (or ``sqlite:PATH``) is an SQLite file, made with its directory; ``postgresql://USER:PASSWORD@HOST/NAME``
    and ``mysql://...`` are servers. Raises DatabaseError.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Database(_Sqlite(Path(url.removeprefix(_SQLITE)).expanduser()))
    if scheme not in _SERVERS:
        wanted = "a path, sqlite:PATH, postgresql://... or mysql://..."
        raise DatabaseError(f"database: no such kind (got {scheme}://, wanted {wanted})")
    return Database(_Server(f"{_SERVERS[scheme]}://{rest}"))


class _Sqlite:
    # A connection for each transaction: they belong to threads, and opening one costs less than what it saves.
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(f"{path}: cannot make the database's directory ({error.strerror})") from error

    def run(self, statements: Sequence[str], values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        try:
            # Others may be writing; they are waited for.
            with closing(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE" if len(statements) > 1 else "BEGIN")
                for statement in statements:
                    rows = connection.execute(statement, values).fetchall()
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise DatabaseError(f"{self._path}: database of converted layers: {error}") from error
        return rows

    def close(self) -> None:
        pass


class _Server:
    def __init__(self, url: str) -> None:
        try:
            import sqlalchemy
        except ImportError as error:
            raise DatabaseError(f"a shared database needs SQLAlchemy: {install_command('database')}") from error
        self._sqlalchemy = sqlalchemy
        try:
            parsed = sqlalchemy.make_url(url)
            #: Without its password.
            self._name = parsed.render_as_string(hide_password=True)
            self._engine: sqlalchemy.Engine = sqlalchemy.create_engine(
                parsed, pool_pre_ping=True, connect_args={"connect_timeout": int(_BUSY_S)}
            )
        except ImportError as error:
            raise DatabaseError(
                f"a shared database needs its driver ({error}): {install_command('database')}"
            ) from error
        except sqlalchemy.exc.ArgumentError as error:
            raise DatabaseError(f"malformed URL of a database: {error}") from error

    def run(self, statements: Sequence[str], values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        for _ in range(_DEADLOCKS):
            try:
                return self._run(statements, values)
            except self._sqlalchemy.exc.OperationalError as error:
                # Two that write the same rows: the server has ended one of them.
                if "deadlock" not in str(error).lower():
                    raise self._failed(error) from error
            time.sleep(random.uniform(0.01, 0.1))
        raise DatabaseError(f"{self._name}: database of converted layers: deadlocks without end")

    def _run(self, statements: Sequence[str], values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        try:
            with self._engine.begin() as connection:
                for statement in statements:
                    result = connection.execute(self._sqlalchemy.text(statement), dict(values))
                    rows = [tuple(row) for row in result] if result.returns_rows else []
        except self._sqlalchemy.exc.OperationalError:
            raise
        except self._sqlalchemy.exc.IntegrityError:
            # Somebody else has written the same row meanwhile; one is as good as the other.
            logger.debug("%s: a row was written by another conversion as well", self._name)
        except self._sqlalchemy.exc.ProgrammingError as error:
            # PostgreSQL, when two make the tables at once.
            if "already exists" not in str(error) and "pg_type" not in str(error):
                raise self._failed(error) from error
        except self._sqlalchemy.exc.SQLAlchemyError as error:
            raise self._failed(error) from error
        return rows

    def _failed(self, error: Exception) -> DatabaseError:
        first = str(getattr(error, "orig", None) or error).strip().splitlines()
        return DatabaseError(f"{self._name}: database of converted layers: {first[0] if first else error}")

    def close(self) -> None:
        self._engine.dispose()


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
    """Return 64 hex digits that stand for a set of options."""
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()


def stack_digest(digests: Sequence[str]) -> str:
    """Return 64 hex digits that stand for a stack of blobs, bottom first."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _cut(place: Place) -> Place:
    # Directories may have longer names than columns hold.
    host, repository = place
    if len(repository) > _LONGEST_NAME:
        repository = f"sha256:{hashlib.sha256(repository.encode(errors='surrogateescape')).hexdigest()}"
    return host, repository
