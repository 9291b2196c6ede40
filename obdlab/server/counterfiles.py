"""Counters of device servers beyond their ends: an ending server adds its counters to a file.

So totals only grow, however many devices come and go. The last exporter to read a killed server's counters adds them;
counts after that reading are lost.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from obdlab.observe.counters import Table, add_to, counted
from obdlab.system.locks import lock_until
from obdlab.system.newfile import replace_file
from obdlab.system.ownfiles import open_own

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from obdlab.devices.device import DeviceStatistics

log = logging.getLogger(__name__)

TALLY_NAME = "counters.json"
TALLY_LOCK_NAME = "counters.lock"

_VERSION = 1
_LOCK_WAIT_S = 2.0
#: If more servers end between two scrapes, the exporter counts some of them twice.
_ENDED_KEPT = 1024
#: Reasons of fetches; the block cache counts each in a field of that name.
CAUSES = ("demand", "readahead", "prefetch", "background")
#: Names in the table, and in the block cache.
_OF_CACHE = {
    "cache_hits": "hits",
    "cache_misses": "misses",
    "fetches": "requests",
    "fetch_failures": "failed_requests",
    "uncached_bytes": "uncached_bytes",
    "cache_evicted_bytes": "evicted_bytes",
}


def server_table(device: DeviceStatistics, source: Mapping[str, float]) -> Table:
    """Return all counters of this process, given its device's and its block cache's."""
    table: Table = {
        "reads": {"": device.reads},
        "read_bytes": {"": device.read_bytes},
        "writes": {"": device.writes},
        "written_bytes": {"": device.written_bytes},
        "io_errors": {"": device.errors},
        "read_seconds": device.read_times,
        "write_seconds": device.write_times,
    }
    if source:
        table |= {name: {"": source.get(field, 0)} for name, field in _OF_CACHE.items()}
        table["fetched_bytes"] = {cause: source.get(f"{cause}_bytes", 0) for cause in CAUSES}
        table["checksum_failures"] = {"cache": source.get("corrupt_units", 0)}
    add_to(table, counted())
    return table


@dataclass(slots=True)
class Tally:
    """Counters of ended servers by device; ``gone`` sums up removed devices."""

    #: Servers ("pid:start time") included here.
    ended: list[str] = field(default_factory=list)
    gone: Table = field(default_factory=dict)
    devices: dict[str, Table] = field(default_factory=dict)

    def add(self, device_id: str, server: str, table: Table) -> bool:
        """Add a server's counters. Return False if they are included already."""
        if server in self.ended:
            return False
        self.ended = [*self.ended, server][-_ENDED_KEPT:]
        add_to(self.devices.setdefault(device_id, {}), table)
        return True

    def forget_devices(self, present: set[str]) -> bool:
        """Move devices that are not ``present`` to ``gone``. Return True if there were any."""
        absent = self.devices.keys() - present
        for device_id in absent:
            add_to(self.gone, self.devices.pop(device_id))
        return bool(absent)


@contextmanager
def changing(run_dir: Path) -> Iterator[Tally]:
    """Yield the run directory's tally; save its changes if the block ends without an exception.

    Raises OSError if it cannot be read or written, or stays locked.
    """
    lock = open_own(run_dir / TALLY_LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        if not lock_until(lock, time.monotonic() + _LOCK_WAIT_S):
            raise TimeoutError(f"{TALLY_NAME}: locked by another process")
        text = _read(run_dir)
        tally = _parsed(text, run_dir)
        yield tally
        changed = json.dumps(
            {"version": _VERSION, "ended": tally.ended, "gone": tally.gone, "devices": tally.devices}
        )
        if changed != text:
            replace_file(run_dir / TALLY_NAME, changed.encode())
    finally:
        os.close(lock)


def leave(run_dir: Path, device_id: str, server: str, table: Table) -> None:
    """Add this server's counters, at its end. Never raises: a device's end must not depend on it."""
    try:
        with changing(run_dir) as tally:
            tally.add(device_id, server, table)
    except OSError as error:
        log.warning("%s: counters of its last server are lost: %s", device_id, error)


def _read(run_dir: Path) -> str:
    try:
        return (run_dir / TALLY_NAME).read_text()
    except FileNotFoundError:
        return ""


# Malformed counters are logged and start from zero: they are not worth a failure.
def _parsed(text: str, run_dir: Path) -> Tally:
    if not text:
        return Tally()
    try:
        values = json.loads(text)
        if values["version"] != _VERSION:
            raise ValueError(f"version {values['version']}")
        ended = [str(server) for server in values["ended"]]
        return Tally(ended, as_table(values["gone"]), {str(k): as_table(v) for k, v in values["devices"].items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("%s: counters begin anew: %r", run_dir / TALLY_NAME, error)
        return Tally()


def as_table(value: Any) -> Table:
    """Return parsed JSON as a table. Raises ValueError, TypeError or AttributeError if it is malformed."""
    return {
        str(name): {str(label): _number(number) for label, number in labels.items()} for name, labels in value.items()
    }


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"not a number (got {value!r})")
    return value  # type: ignore[no-any-return]
