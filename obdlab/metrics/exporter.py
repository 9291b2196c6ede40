"""Metrics and health of all devices of a run directory, over HTTP, for Prometheus.

At each scrape, one process asks every device server for its counters. A server that does not answer in time delays
nothing: it is shown as hung, with its last known counters.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from obdlab.cache.space import disk_usage
from obdlab.errors import ObdlabError
from obdlab.metrics import snapshotterclient
from obdlab.metrics.families import Interval, gauge, hit_ratio, original_metrics, table_metrics
from obdlab.observe.counters import Table, add_to
from obdlab.server import controlclient, counterfiles
from obdlab.server.messages import Counters, GetCounters
from obdlab.server.rundir import DeviceRecord, RunDir
from obdlab.system.processes import Process

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from prometheus_client.core import Metric

log = logging.getLogger(__name__)

#: Most servers to wait for at a time.
_ASKERS = 64
#: Shortest interval for the rates of the original's families.
_LEAST_INTERVAL_S = 1.0

ALIVE, HUNG, DEAD = "alive", "hung", "dead"


@dataclass(slots=True)
class Server:
    """One server process, as of its last answer."""

    device_id: str
    name: str
    table: Table
    ages_s: dict[str, float]
    under_way_s: tuple[float, ...]
    threads: int
    at: float = field(default_factory=time.monotonic)

    @property
    def process(self) -> Process:
        """The server's process."""
        pid, _, start_time = self.name.partition(":")
        return Process(int(pid), int(start_time))


@dataclass(slots=True)
class Snapshot:
    """All known state at one time."""

    #: State of each device: alive, hung or dead.
    states: dict[str, str] = field(default_factory=dict)
    records: dict[str, DeviceRecord] = field(default_factory=dict)
    servers: list[Server] = field(default_factory=list)
    #: Counters by device, of the present devices; then of all devices there ever were.
    tables: dict[str, Table] = field(default_factory=dict)
    total: Table = field(default_factory=dict)
    taken_s: float = 0.0


class Collected:
    """Asks the servers of a run directory; remembers the counters of each. Thread-safe.

    A server has ``deadline_s`` to answer.
    """

    def __init__(self, run_dir: Path, *, deadline_s: float = 0.5) -> None:
        self._run = RunDir(run_dir)
        self._deadline_s = deadline_s
        self._known: dict[str, Server] = {}
        self._lock = threading.Lock()
        self._tally = counterfiles.Tally()

    def look_at_snapshotters(self) -> list[Table]:
        """Return the counters of the run directory's snapshotters."""
        return snapshotterclient.ask_all(self._run.path, self._deadline_s)

    def look(self) -> Snapshot:
        """Return the present state."""
        with self._lock:
            begun = time.monotonic()
            snapshot = Snapshot()
            directories = self._run.device_directories()
            answered = self._ask_all(directories)
            for directory in directories:
                record = DeviceRecord.load(directory)
                if record is None:  # being attached, or its leftovers
                    continue
                snapshot.records[directory.name] = record
                snapshot.states[directory.name] = (
                    ALIVE if directory.name in answered or record.is_graduated else HUNG if record.alive else DEAD
                )
            self._count(snapshot)
            snapshot.taken_s = time.monotonic() - begun
            return snapshot

    # Returns the devices whose server has answered.
    def _ask_all(self, directories: Iterable[Path]) -> set[str]:
        sockets = [path for directory in directories for path in sorted(directory.glob("*.sock"))]
        answered = set()
        # No context manager: its end would wait for servers that hang.
        askers = ThreadPoolExecutor(_ASKERS, "ask")
        try:
            for path, server in zip(
                sockets, askers.map(self._ask, sockets, timeout=4 * self._deadline_s), strict=False
            ):
                if server is not None:
                    self._known[server.name] = server
                    if path.name == controlclient.CONTROL_NAME:
                        answered.add(server.device_id)
        except FuturesTimeoutError:
            log.warning("%s: more servers hang than can be waited for", self._run.devices)
        finally:
            askers.shutdown(wait=False, cancel_futures=True)
        return answered

    def _ask(self, path: Path) -> Server | None:
        try:
            answer = controlclient.ask(
                path.parent, GetCounters(), Counters, silence_s=self._deadline_s, socket_name=path.name
            )
            return _server(path.parent.name, answer)
        except (ObdlabError, ValueError) as error:
            log.info("%s: no counters: %s", path, error)
            return None

    def _count(self, snapshot: Snapshot) -> None:
        present = set(snapshot.states)
        try:
            with counterfiles.changing(self._run.path) as kept:
                for name, server in self._known.items():
                    if name not in kept.ended and not server.process.alive:
                        kept.add(server.device_id, name, server.table)  # killed
                live = {name: server for name, server in self._known.items() if name not in kept.ended}
                kept.forget_devices(present | {server.device_id for server in live.values()})
            self._tally, self._known = kept, live
        except FileNotFoundError:  # no run directory yet
            pass
        except OSError as error:
            log.warning("%s: counters of ended servers: %s", self._run.path, error)
        snapshot.servers = list(self._known.values())
        for device_id in present:
            snapshot.tables[device_id] = {}
            add_to(snapshot.tables[device_id], self._tally.devices.get(device_id, {}))
        add_to(snapshot.total, self._tally.gone)
        for table in self._tally.devices.values():
            add_to(snapshot.total, table)
        for server in snapshot.servers:
            add_to(snapshot.total, server.table)
            add_to(snapshot.tables.setdefault(server.device_id, {}), server.table)


class ObdlabCollector(Collector):
    """Builds all families at each scrape. Requests under way for longer than ``hung_after_s`` count as hung."""

    def __init__(self, collected: Collected, cache_dir: Path, *, hung_after_s: float = 10.0) -> None:
        self._collected = collected
        self._cache_dir = cache_dir
        self._hung_after_s = hung_after_s
        self._node = socket.gethostname()
        self._lock = threading.Lock()
        self._interval = Interval({}, {}, 0.0)
        self._interval_end = 0.0

    def describe(self) -> Iterable[Metric]:
        """No static families; they are built at scrape time."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Ask all servers, and return all families."""
        snapshot = self._collected.look()
        yield gauge("obdlab_build_info", "1, and the version", {(version("obdlab"),): 1}, "version")
        yield from self._device_gauges(snapshot)
        yield from self._host_gauges(snapshot)
        yield from table_metrics("obdlab_device_", snapshot.tables)
        yield from table_metrics("obdlab_", {"": snapshot.total})
        yield from self._original_metrics(snapshot)
        yield from snapshotterclient.metrics(self._collected.look_at_snapshotters())

    def _device_gauges(self, snapshot: Snapshot) -> Iterator[Metric]:
        under_way: dict[tuple[str, ...], float] = {(device_id,): 0 for device_id in snapshot.states}
        hung, longest, threads = dict(under_way), dict(under_way), dict(under_way)
        now = time.monotonic()
        for server in snapshot.servers:
            key = (server.device_id,)
            if key not in under_way:
                continue
            ages = [age + now - server.at for age in server.under_way_s]
            under_way[key] += len(ages)
            hung[key] += sum(age > self._hung_after_s for age in ages)
            longest[key] = max(longest[key], *ages, 0)
            threads[key] += server.threads
        up = {(device_id,): float(state == ALIVE) for device_id, state in snapshot.states.items()}
        info = {
            (device_id, record.path, record.kind, record.config): 1.0
            for device_id, record in snapshot.records.items()
        }
        ratios = {(device_id,): hit_ratio(table) for device_id, table in snapshot.tables.items()}
        yield gauge("obdlab_device_info", "1, and what it is", info, "device", "path", "kind", "config")
        yield gauge("obdlab_device_up", "1 if its server answers", up, "device")
        yield gauge("obdlab_device_requests_under_way", "Requests not answered yet", under_way, "device")
        yield gauge(
            "obdlab_device_hung_io", f"Requests under way for more than {self._hung_after_s:g} s", hung, "device"
        )
        yield gauge("obdlab_device_longest_wait_seconds", "Age of the oldest request under way", longest, "device")
        yield gauge("obdlab_device_threads", "Threads that serve", threads, "device")
        yield gauge(
            "obdlab_device_cache_hit_ratio",
            "Share of the reads of layers that did not wait for a registry",
            {key: ratio for key, ratio in ratios.items() if ratio is not None},
            "device",
        )
        yield gauge("obdlab_hung_io", "Hung requests of all devices", {(): sum(hung.values())})

    def _host_gauges(self, snapshot: Snapshot) -> Iterator[Metric]:
        states = list(snapshot.states.values())
        counts: dict[tuple[str, ...], float] = {(state,): states.count(state) for state in (ALIVE, HUNG, DEAD)}
        yield gauge("obdlab_devices", "Devices, by how they are", counts, "state")
        ratio = hit_ratio(snapshot.total)
        yield gauge(
            "obdlab_cache_hit_ratio",
            "Share of the reads of layers that did not wait for a registry",
            {} if ratio is None else {(): ratio},
        )
        yield gauge("obdlab_cache_used_bytes", "What the block cache holds on disk", _used(self._cache_dir))
        yield gauge("obdlab_scrape_seconds", "How long asking all servers took", {(): snapshot.taken_s})

    # Several scrapers would shorten each other's intervals, so an interval lasts at least a second.
    def _original_metrics(self, snapshot: Snapshot) -> list[Metric]:
        with self._lock:
            now = time.monotonic()
            passed_s = now - self._interval_end
            if not self._interval_end:  # the first scrape: nothing to compare with
                self._interval, self._interval_end = Interval(snapshot.total, snapshot.total, 0.0), now
            elif passed_s >= _LEAST_INTERVAL_S:
                self._interval = Interval(self._interval.after, snapshot.total, passed_s)
                self._interval_end = now
            return original_metrics(self._node, snapshot.total, self._interval)


def registry_of(collector: ObdlabCollector) -> CollectorRegistry:
    """Return a prometheus_client registry with this collector alone."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return registry


def _used(cache_dir: Path) -> dict[tuple[str, ...], float]:
    try:
        return {(): float(disk_usage(cache_dir))}
    except OSError:  # not there yet
        return {}


def _server(device_id: str, answer: Counters) -> Server:
    server = Server(device_id, answer.server, answer.table, answer.ages_s, answer.under_way_s, answer.threads)
    _ = server.process  # raises if the name is malformed
    return server
