"""Databases of converted layers on PostgreSQL and MySQL servers, by SQLAlchemy (the extra ``database``)."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Any

from obdlab.command import install_command
from obdlab.convert.database import BUSY_S, DatabaseError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import sqlalchemy

logger = logging.getLogger(__name__)

# Retries of a transaction that a server aborts to end a deadlock.
_DEADLOCKS = 20
# Codes of servers: SQLSTATE of PostgreSQL, numbers of MySQL.
# Two transactions wrote the same rows, and the server has aborted one of them.
_DEADLOCK = ("40P01", 1213)
# PostgreSQL, when two conversions make the tables at once: duplicate table, object, key of pg_type.
_MADE_ALREADY = ("42P07", "42710", "23505")
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql"}


class Server:
    """A database on a server. Raises DatabaseError if SQLAlchemy or its driver is missing or the URL is malformed."""

    def __init__(self, url: str) -> None:
        try:
            import sqlalchemy
        except ImportError as error:
            raise DatabaseError(f"a shared database needs SQLAlchemy: {install_command('database')}") from error
        self._sqlalchemy = sqlalchemy
        try:
            parsed = sqlalchemy.make_url(url)
            parsed = parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))
            #: The URL without its password.
            self._name = parsed.render_as_string(hide_password=True)
            self._engine: sqlalchemy.Engine = sqlalchemy.create_engine(
                parsed, pool_pre_ping=True, connect_args={"connect_timeout": int(BUSY_S)}
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
                if not _has_code(error, _DEADLOCK):
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
            # Another conversion has written the same row meanwhile; either is as good.
            logger.debug("%s: a row was written by another conversion as well", self._name)
        except self._sqlalchemy.exc.ProgrammingError as error:
            if not _has_code(error, _MADE_ALREADY):
                raise self._failed(error) from error
        except self._sqlalchemy.exc.SQLAlchemyError as error:
            raise self._failed(error) from error
        return rows

    def _failed(self, error: Exception) -> DatabaseError:
        first = str(getattr(error, "orig", None) or error).strip().splitlines()
        return DatabaseError(f"{self._name}: database of converted layers: {first[0] if first else error}")

    def close(self) -> None:
        self._engine.dispose()


# Drivers differ: psycopg's errors have the SQLSTATE; pymysql's begin with the server's number, and may have both.
def _has_code(error: Exception, codes: tuple[str | int, ...]) -> bool:
    cause = getattr(error, "orig", None)
    return getattr(cause, "sqlstate", None) in codes or next(iter(getattr(cause, "args", ())), None) in codes
