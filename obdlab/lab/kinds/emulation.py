"""Starts on 1 to 32 hosts that pass blocks on: real agents in network namespaces of one machine.

(The paper's figures 14, "from peers", and 17.) Hosts and links are emulated, a recorded start is replayed: rows have
the label "emulated". So that the processors of one machine suffice for all hosts, links are slow, and the start's
own time is stretched as much (``slower``). Each row says how busy the processors were.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from obdlab.lab.kinds.kind import Bench, Kind, Metric, SpecError
from obdlab.lab.kinds.simulation import workload_of
from obdlab.lab.testbed.agents import PREFIX, Agents, SharedRegistry, busy_s, total
from obdlab.lab.testbed.hostnet import ORIGIN, HostNetwork
from obdlab.lab.testbed.startreplay import Replayer, Start, run_together
from obdlab.peers.simulator.rules import NAMES
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from obdlab.lab.kinds.kind import Job, Option, Point, Row, Value

#: The label of every row of this kind.
LABEL = "emulated"
#: Beyond this share of busy processors the machine is measured, and not the links.
MOST_BUSY = 0.7
ROOT = "root"
_COLD, _WARM_ROOT = "cold", "warm root"
_DIRECT, _NONE = "direct", "none"
#: Topologies with an agent that keeps the trees, and those in which that agent is the root.
_MANAGED, _ROOTED = ("rooted", "redirect", "balanced"), ("rooted", "redirect")
_MOST_HOSTS = 64
_NAME = "start"
_START_S, _AGENT_S = 120.0, 1.0


class Swarm(Kind):
    """Hosts start at one moment; every host has an agent and a replayer of the start, and an empty cache."""

    name: ClassVar[str] = "swarm"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "topology": ("rendezvous", _DIRECT),
        "hosts": (1, 2, 4, 8),
        "caches": (_COLD,),
    }
    options: ClassVar[Mapping[str, Value]] = {
        "timeline": "measured/timeline/redis.json",
        "block_kib": 1024,
        "working_set_mb": 4.0,
        "local_ms": 130.0,
        "slower": 40.0,
        "up_mbit": 32.0,
        "root_mbit": 0.0,
        "origin_mbit": 64.0,
        "origin_rtt_ms": 0.0,
        "arity": 2,
        "again": 2,
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("median_s", "s"),
        Metric("first_s", "s"),
        Metric("slowest_s", "s"),
        Metric("origin_sets", "working sets"),
        Metric("peer_sets", "working sets"),
        Metric("most_sent_sets", "working sets"),
        Metric("failovers", ""),
        Metric("cpu_share", ""),
        Metric("own_cpu_share", ""),
    )
    programs: ClassVar[Mapping[str, str]] = {"docker-registry": "docker-registry"}
    cell_timeout_s: ClassVar[float] = 600.0
    measured: ClassVar[tuple[str, ...]] = ("obdlab.lab.kinds.emulation", "obdlab.peers.agent.starting")

    def checked(
        self, axes: Mapping[str, tuple[Value, ...]], options: Mapping[str, Option]
    ) -> tuple[Mapping[str, tuple[Value, ...]], Mapping[str, Option]]:
        """Return both. Raises SpecError for unknown names and for numbers that no swarm has."""
        for axis, names in {"topology": NAMES, "caches": (_COLD, _WARM_ROOT)}.items():
            for value in axes[axis]:
                if value not in names:
                    raise SpecError(f"axes.{axis}: unknown (got {value!r}, wanted one of {', '.join(names)})")
        if any(not 1 <= int(value) <= _MOST_HOSTS for value in axes["hosts"]):
            raise SpecError(f"axes.hosts: wanted 1 to {_MOST_HOSTS} (got {list(axes['hosts'])})")
        if min(float(options[key]) for key in ("up_mbit", "origin_mbit", "slower", "arity")) <= 0:
            raise SpecError("options: up_mbit, origin_mbit, slower and arity are positive")
        if min(float(options[key]) for key in ("root_mbit", "origin_rtt_ms", "local_ms", "working_set_mb")) < 0:
            raise SpecError("options: root_mbit, origin_rtt_ms, local_ms and working_set_mb are not negative")
        return axes, options

    def columns(self, options: Mapping[str, Option], point: Point) -> Row:
        """Return the point, the label, and how much slower links and start are than real ones."""
        return {**super().columns(options, point), "label": LABEL, "slower": float(options["slower"])}

    @contextmanager
    def _open(self, job: Job) -> Iterator[Bench]:
        options, most = job.options, max(int(value) for value in job.axes["hosts"])
        up_mbit = float(options["up_mbit"])
        rates = {ROOT: float(options["root_mbit"]) or up_mbit, **{f"h{number}": up_mbit for number in range(most)}}
        with ExitStack() as stack:
            start = Start(workload_of(options), _NAME)
            network = HostNetwork(rates, float(options["origin_mbit"]), float(options["origin_rtt_ms"]))
            stack.enter_context(network)
            registry = stack.enter_context(SharedRegistry(job.work / "registry", network.registry))
            _push(start, registry)
            bench = _Swarm(start, network, registry, options, job.work)
            stack.callback(bench.clean)
            yield bench

    def estimate(
        self,
        axes: Mapping[str, tuple[Value, ...]],
        options: Mapping[str, Option],
        points: Sequence[Point],
        sizes: Mapping[str, int],
        disk_size: int,
    ) -> tuple[float, int]:
        """Return the seconds of starting agents and replaying, and the bytes of all caches of one cell."""
        size = float(options["working_set_mb"]) * 1e6 or 25e6
        own_s = 2 * float(options["local_ms"]) / 1e3 * float(options["slower"])
        rate = float(options["origin_mbit"]) * 1e6 / 8
        hosts = [int(point["hosts"]) for point in points]
        direct = [int(point["hosts"]) for point in points if point["topology"] == _DIRECT]
        seconds = sum(2 + own_s + _AGENT_S * each for each in hosts) + sum(each * size / rate for each in direct)
        return seconds, round(size * (2 + max(hosts, default=0)))


def _push(start: Start, registry: SharedRegistry) -> None:
    reference = Reference.parse(registry.reference(_NAME))
    with closing(RegistryClient()) as client:
        repository = client.repository(reference)
        for layer in start.layers:
            for data, digest in ((layer.data, layer.digest), (layer.tree.file, layer.tree.reference.file)):
                if data:
                    client.push_blob(repository, digest, len(data), partial(BytesIO, data))
    registry.preload()


class _Swarm(Bench):
    def __init__(
        self,
        start: Start,
        network: HostNetwork,
        registry: SharedRegistry,
        options: Mapping[str, Option],
        work: Path,
    ) -> None:
        self._start, self._network, self._registry, self._options = start, network, registry, options
        self._directory = work / "cell"
        self._agents: Agents | None = None

    def environment(self) -> dict[str, Any]:
        """Return the facts about hosts and links."""
        return {"swarm": self._network.facts()}

    def measure(self, point: Point) -> Generator[Row]:
        """Start fresh agents, then the recorded start on all hosts at once."""
        for again in range(int(self._options["again"]) + 1):
            self._directory.mkdir()
            try:
                row = self._measured(str(point["topology"]), int(point["hosts"]), str(point["caches"]))
            finally:
                self.clean()
            # Other programs come and go: with less of them the next one may say more of the links.
            if row["links_decide"] or again == self._options["again"]:
                yield {**row, "again": again}
                return

    def clean(self) -> None:
        """End the agents, and remove their caches."""
        if self._agents is not None:
            self._agents.close()
        self._agents = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _measured(self, topology: str, hosts: int, caches: str) -> Row:
        options, names = self._options, [f"h{number}" for number in range(hosts)]
        managed = topology in _MANAGED
        registry = f"{ORIGIN}:{self._registry.port}"
        self._agents = agents = Agents(self._network, [ROOT, *names] if managed else names, registry, self._directory)
        manager = ("--manager", ROOT) if managed else ()
        kept = _NONE if topology == _DIRECT else topology
        agents.start("--topology", kept, "--arity", str(options["arity"]), *manager)
        readers = {name: Replayer(self._start, agents.address(name), self._path) for name in agents.names}
        if caches == _WARM_ROOT and topology in _ROOTED:
            run_together(self._network, {ROOT: readers[ROOT]}, 0.0, 0.0, _START_S)
        before = {name: agents.metrics(name) for name in agents.names}
        drops, mark = self._network.drops(), self._registry.mark()
        own_s, busy, began_s = agents.cpu_s() + time.process_time(), busy_s(), time.monotonic()
        local_s, slower = float(options["local_ms"]) / 1e3, float(options["slower"])
        took = run_together(self._network, {name: readers[name] for name in names}, local_s, slower, _START_S * 2)
        after, ended_s = busy_s(), time.monotonic()
        own_s = agents.cpu_s() + time.process_time() - own_s
        traffic = self._registry.traffic(mark, self._registry.mark())
        came = {
            name: {key: value - before[name].get(key, 0.0) for key, value in agents.metrics(name).items()}
            for name in agents.names
        }
        size, seconds = self._start.workload.size, list(took.values())
        cpu_share = (after[0] - busy[0]) / max(after[1] - busy[1], 0.01)
        return {
            "median_s": median(seconds),
            "first_s": min(seconds),
            "slowest_s": max(seconds),
            "spread_s": max(seconds) - min(seconds),
            # By the registry's own log; hash trees included, and bytes that were sent twice.
            "origin_sets": traffic.written / size,
            "origin_requests": traffic.requests,
            "peer_sets": total(came, 'received_bytes_total{source="peer"}') / size,
            "most_sent_sets": max(each.get('sent_bytes_total{to="peer"}', 0.0) for each in came.values()) / size,
            "failovers": total(came, "failovers_total"),
            "wrong_units": total(came, "verification_failures_total"),
            "warnings": agents.warnings(),
            "drops": self._network.drops() - drops,
            "cpu_share": cpu_share,
            "own_cpu_share": own_s / (ended_s - began_s) / self._processors(after, busy, ended_s - began_s),
            "links_decide": cpu_share <= MOST_BUSY,
            "working_set": size,
        }

    # All processors of the machine, whose ticks /proc/stat sums up.
    def _processors(self, after: tuple[float, float], before: tuple[float, float], seconds: float) -> int:
        return max(1, round((after[1] - before[1]) / seconds))

    def _path(self, digest: str) -> str:
        return f"/{PREFIX}/http://{ORIGIN}:{self._registry.port}/v2/{_NAME}/blobs/{digest}"
