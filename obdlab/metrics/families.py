"""The metric families that the exporter serves, and their samples from the servers' counters.

Each counter and histogram appears twice: ``obdlab_device_<name>`` with a label ``device``, and ``obdlab_<name>``, the
sum over all devices there ever were. ``docs/reference/metrics.md`` describes them all; a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from obdlab.observe.counters import cumulated
from obdlab.server.counterfiles import CAUSES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client.core import Metric

    from obdlab.observe.counters import Table

Labels = TypeVar("Labels", bound=tuple[str, ...])

#: Bounds of all histograms: 2^14 ns (16 µs) to 2^37 ns (137 s), each twice the one before.
BOUNDS = range(14, 38)
BOUND_TEXTS = [repr((1 << bits) / 1e9) for bits in BOUNDS]


@dataclass(frozen=True, slots=True)
class Family:
    """One name in a table of counters, and its family. ``values`` of the label are served even if 0."""

    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()


COUNTERS = (
    Family("reads", "Reads that devices have answered"),
    Family("read_bytes", "Bytes read from devices"),
    Family("writes", "Writes that devices have answered"),
    Family("written_bytes", "Bytes written to devices"),
    Family("io_errors", "Requests that devices have answered with an error"),
    Family("cache_hits", "Reads of layers served without waiting for a registry"),
    Family("cache_misses", "Reads of layers that had to wait for a registry"),
    Family("fetches", "Pieces of layers fetched, or tried to"),
    Family("fetch_failures", "Pieces of layers that could not be fetched"),
    Family("fetched_bytes", "Bytes fetched, by why they were", "cause", CAUSES),
    Family("uncached_bytes", "Bytes fetched and not kept, as cache or disk were full or failed"),
    Family("cache_evicted_bytes", "Bytes that the cache gave back to stay within its limits"),
    Family("cache_store_failures", "Stores into the cache that failed"),
    Family(
        "checksum_failures",
        "Checksums that did not match, by where",
        "where",
        ("cache", "zfile", "tree", "target", "digest"),
    ),
    Family("decompression_failures", "Blocks that did not decompress"),
    Family(
        "lazy_layers", "Layers opened to be read from a registry, by their check", "units", ("checked", "unchecked")
    ),
    Family("traces_ignored", "Traces of images that could not be used: damaged, missing, or of another image"),
    Family(
        "corruptions_healed",
        "Damage replaced by sound bytes, by where",
        "where",
        ("cache", "zfile", "tree", "target"),
    ),
    Family("registry_requests", "HTTP exchanges, by status; failed: without an answer", "status"),
    Family("registry_retries", "Tries of a registry request after the first"),
    Family("download_bytes", "Bytes that reads from registries have brought"),
)
HISTOGRAMS = (
    Family("read_seconds", "How long devices took for a read"),
    Family("write_seconds", "How long devices took for a write"),
    Family("miss_seconds", "How long readers waited for what was not in the cache"),
    Family("download_seconds", "How long reads from registries took, retries included"),
)


def table_metrics(prefix: str, tables: Mapping[str, Table]) -> list[Metric]:
    """Return all counters and histograms, named ``<prefix><name>``, of tables by device; "" stands for no device."""
    by_device = "" not in tables
    metrics: list[Metric] = []
    for family in COUNTERS:
        labels = (["device"] if by_device else []) + ([family.label] if family.label else [])
        counter = CounterMetricFamily(f"{prefix}{family.name}", family.help, labels=labels)
        for device_id, table in tables.items():
            numbers = dict.fromkeys(family.values if family.label else ("",), 0.0) | table.get(family.name, {})
            for value, number in numbers.items():
                counter.add_metric(([device_id] if by_device else []) + ([value] if family.label else []), number)
        metrics.append(counter)
    for family in HISTOGRAMS:
        histogram = HistogramMetricFamily(f"{prefix}{family.name}", family.help, labels=["device"] * by_device)
        for device_id, table in tables.items():
            below, count, sum_s = cumulated(table.get(family.name, {}), BOUNDS)
            buckets = [*zip(BOUND_TEXTS, below, strict=True), ("+Inf", count)]
            histogram.add_metric([device_id] * by_device, buckets, sum_s)
        metrics.append(histogram)
    return metrics


def gauge(name: str, help_text: str, values: Mapping[Labels, float], *labels: str) -> Metric:
    """Return a gauge with a sample for each tuple of label values."""
    metric = GaugeMetricFamily(name, help_text, labels=labels)
    for key, value in values.items():
        metric.add_metric(key, value)
    return metric


def value_of(table: Table, name: str, label: str = "") -> float:
    """Return one number of a table, 0 if it is missing."""
    return table.get(name, {}).get(label, 0)


def hit_ratio(table: Table) -> float | None:
    """Return the share of layer reads that did not wait; None without reads."""
    hits, misses = value_of(table, "cache_hits"), value_of(table, "cache_misses")
    return hits / (hits + misses) if hits + misses else None


# -- the families of the original ------------------------------------------------------------------------------------

#: The original's types: their bytes and times by name in a table.
_TYPES = {"pread": ("read_bytes", "read_seconds"), "download": ("download_bytes", "download_seconds")}


@dataclass(frozen=True, slots=True)
class Interval:
    """The interval of rates: its two tables and its length."""

    before: Table
    after: Table
    passed_s: float


def original_metrics(node: str, total: Table, interval: Interval) -> list[Metric]:
    """Return the families of overlaybd's exporter under its names; rates and maxima are over the interval.

    Node, type and mode are in labels of those names, where the original has the type in ``node``.
    """
    labels = {kind: (node, kind, "read") for kind in _TYPES}
    before, after = interval.before, interval.after
    per_second = 1 / interval.passed_s if interval.passed_s > 0 else 0.0
    throughput, rate, slowest, count = {}, {}, {}, {}
    for kind, (bytes_name, times_name) in _TYPES.items():
        delta = _difference(after.get(times_name, {}), before.get(times_name, {}))
        grown = value_of(after, bytes_name) - value_of(before, bytes_name)
        throughput[labels[kind]] = max(0.0, grown) * per_second
        rate[labels[kind]] = sum(delta.values()) * per_second
        slowest[labels[kind]] = (1 << max(delta)) / 1e3 if delta else 0.0
        count[node, kind] = value_of(total, bytes_name)
    return [
        gauge("OverlayBD_Alive", "1: the exporter answers", {(node,): 1.0}, "node"),
        gauge("OverlayBD_Read_Throughtput", "Bytes / sec", throughput, "node", "type", "mode"),
        gauge("OverlayBD_QPS", "Reads / sec", rate, "node", "type", "mode"),
        gauge("OverlayBD_MaxLatency", "us, rounded up to a power of two of ns", slowest, "node", "type", "mode"),
        gauge("OverlayBD_Count", "Bytes", count, "node", "type"),
    ]


def _difference(now: Mapping[str, float], before: Mapping[str, float]) -> dict[int, float]:
    grown = {label: count - before.get(label, 0) for label, count in now.items() if label != "sum"}
    return {int(label): count for label, count in grown.items() if count > 0}
