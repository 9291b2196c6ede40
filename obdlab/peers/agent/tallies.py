"""An agent's counters, in the form that Prometheus reads."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

#: Families with a label: the label's name and the description.
_LABELLED = {
    "received_bytes": ("source", "Bytes that came to this agent: from a peer, or from a registry (origin)"),
    "sent_bytes": ("to", "Bytes that went out: to readers on this host (local), or to other agents (peer)"),
    "served_bytes": ("from", "Of the bytes that went out: read from the cache's files, or passed on as they came"),
    "requests": ("answer", "Requests by the status of their answer"),
}
_PLAIN = {
    "failovers": "Transfers that went on from another source, as an agent failed, was silent or too slow",
    "verification_failures": "Wrong units that agents sent; none was stored or passed on",
    "loops": "Requests that had passed this agent before",
    "attached": "Readers that joined a transfer under way",
}
_HOPS = (0, 1, 2, 4, 8, 16, 32)


class Tallies:
    """Counters of one agent. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._hops: defaultdict[int, int] = defaultdict(int)
        #: Values that are asked for when they are shown: name to description and function.
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        """Add to a counter."""
        if name not in (_LABELLED if label else _PLAIN):
            raise ValueError(f"no such counter: {name}")
        with self._lock:
            self._counted[name, label] += amount

    def passed(self, hops: int) -> None:
        """Count a request that had passed that many agents."""
        with self._lock:
            self._hops[hops] += 1

    def value(self, name: str, label: str = "") -> float:
        """Return a counter."""
        with self._lock:
            return self._counted[name, label]

    def text(self) -> bytes:
        """Return all of them as Prometheus's text."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the families, for prometheus-client."""
        with self._lock:
            counted, hops = dict(self._counted), dict(self._hops)
        for name, (label, help_text) in _LABELLED.items():
            family = CounterMetricFamily(f"obdlab_peer_{name}", help_text, labels=[label])
            for (each, value), number in sorted(counted.items()):
                if each == name:
                    family.add_metric([value], number)
            yield family
        for name, help_text in _PLAIN.items():
            yield CounterMetricFamily(f"obdlab_peer_{name}", help_text, value=counted.get((name, ""), 0))
        for name, (help_text, value_of) in self.gauges.items():
            yield GaugeMetricFamily(f"obdlab_peer_{name}", help_text, value=value_of())
        below = [(str(bound), sum(n for hop, n in hops.items() if hop <= bound)) for bound in _HOPS]
        yield HistogramMetricFamily(
            "obdlab_peer_hops",
            "Agents that requests had passed before this one",
            buckets=[*below, ("+Inf", sum(hops.values()))],
            sum_value=sum(hop * n for hop, n in hops.items()),
        )
