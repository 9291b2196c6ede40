"""Serves a snapshotter's counters at a socket: ``<run dir>/snapshotters/<name>.sock``.

Separate from :mod:`obdlab.metrics.snapshotterclient`, the client side, which imports Prometheus' library.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError
from obdlab.server import wire
from obdlab.server.messages import GetCounters, Tables

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from obdlab.observe.counters import Table

log = logging.getLogger(__name__)

#: Family of a snapshotter's table that counts its snapshots by kind.
SNAPSHOTS = "snapshots"
_TIMEOUT_S = 5.0


def directory_of(run_dir: Path) -> Path:
    """Return the directory of the sockets."""
    return run_dir / "snapshotters"


class Telling:
    """Answers every client with ``table()``, from a thread of its own."""

    def __init__(self, run_dir: Path, name: str, table: Callable[[], Table]) -> None:
        """Listen. Raises OSError."""
        directory = directory_of(run_dir)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = directory / f"{name}.sock"
        self._table = table
        self._listener = wire.listen(self._path)
        threading.Thread(target=self._run, name="counters", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        try:
            wire.receive(connection, _TIMEOUT_S, (GetCounters,))
            connection.settimeout(_TIMEOUT_S)
            wire.send(connection, Tables(self._table()))
        except (OSError, DeviceError) as error:  # the client went away, or never asked
            log.info("counters: %s", error)
        except Exception:
            log.exception("counters could not be told")
