"""Collects the counters of a run directory's snapshotters at their sockets, as families for Prometheus.

A socket without a listener is removed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, UnknownMetricFamily

from obdlab.errors import DeviceError
from obdlab.metrics.families import BOUND_TEXTS, BOUNDS, gauge
from obdlab.observe.counters import add_to, cumulated
from obdlab.server import wire
from obdlab.server.messages import GetCounters, Tables
from obdlab.server.snapshottersocket import SNAPSHOTS, directory_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prometheus_client.core import Metric

    from obdlab.observe.counters import Table

log = logging.getLogger(__name__)

#: Families of a snapshotter's table. Each function has its own histogram: ``rpc_seconds:<function>``.
RPC_SECONDS, RPC_ERRORS, FALLBACKS = "rpc_seconds", "rpc_errors", "snapshotter_fallbacks"
KINDS = ("view", "active", "committed")
REASONS = ("no-block-devices", "registry-without-ranges", "not-overlaybd", "unproven-layer")
#: Calls under the original's names, then the differ's.
FUNCTIONS = (
    *("Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "Walk", "Usage", "Cleanup"),
    *("Apply", "Diff"),
)
#: Answers, not failures: the pulled layer exists; the layer is containerd's own differ's.
_NO_ERRORS = ("ALREADY_EXISTS", "UNIMPLEMENTED")


def ask_all(run_dir: Path, deadline_s: float) -> list[Table]:
    """Return the tables of all snapshotters that answer in time; never raises DeviceError or OSError."""
    return [table for path in sorted(directory_of(run_dir).glob("*.sock")) if (table := _ask(path, deadline_s))]


def _ask(path: Path, deadline_s: float) -> Table | None:
    try:
        with wire.connect(path, deadline_s) as connection:
            wire.send(connection, GetCounters())
            answer = wire.receive(connection, deadline_s, (Tables,))
            return answer.table if isinstance(answer, Tables) else None
    except ConnectionRefusedError:  # killed
        path.unlink(missing_ok=True)
    except (OSError, DeviceError) as error:
        log.info("%s: no counters: %s", path, error)
    return None


def metrics(tables: list[Table]) -> Iterator[Metric]:
    """Return the families of all snapshotters together: the original's under its names, and our own."""
    total: Table = {}
    for table in tables:
        add_to(total, table)
    errors = [(*label.partition(":")[::2], count) for label, count in total.get(RPC_ERRORS, {}).items()]
    yield gauge("is_alive", "1 if a snapshotter answers", {(): float(bool(tables))})
    latency = HistogramMetricFamily("grpc_latency_seconds", "How long calls took", labels=["function"])
    failed = UnknownMetricFamily("grpc_error_count", "Calls of the snapshotter that failed", labels=["function"])
    for function in FUNCTIONS:
        below, count, sum_s = cumulated(total.get(f"{RPC_SECONDS}:{function}", {}), BOUNDS)
        latency.add_metric([function], [*zip(BOUND_TEXTS, below, strict=True), ("+Inf", count)], sum_s)
        counted = sum(count for name, code, count in errors if name == function and code not in _NO_ERRORS)
        failed.add_metric([function], counted)
    yield latency
    yield failed
    by_code = CounterMetricFamily(
        "obdlab_snapshotter_rpc_errors", "Calls of the snapshotter that failed", labels=["function", "code"]
    )
    for name, code, count in errors:
        by_code.add_metric([name, code], count)
    yield by_code
    reasons = CounterMetricFamily(
        "obdlab_snapshotter_fallbacks", "Images and layers that are not read lazily, by why", labels=["reason"]
    )
    for reason, count in (dict.fromkeys(REASONS, 0.0) | total.get(FALLBACKS, {})).items():
        reasons.add_metric([reason], count)
    yield reasons
    kinds: dict[tuple[str, ...], Any] = {(kind,): total.get(SNAPSHOTS, {}).get(kind, 0.0) for kind in KINDS}
    yield gauge("obdlab_snapshotter_snapshots", "Snapshots, by kind", kinds, "kind")
