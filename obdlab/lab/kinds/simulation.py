"""Starts on many hosts that pass blocks on, simulated: no number of this kind is measured.

(The paper's figures 20 and 21, FaaSNet's 11 to 17.) The seed of a row is the number of its repeat.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from obdlab.lab.kinds.kind import Bench, Job, Kind, Metric, SpecError
from obdlab.lab.testbed.process import LabError
from obdlab.lab.workbench import find
from obdlab.peers.simulator import Outcome, SimulationError, Site, Workload, simulate
from obdlab.peers.simulator.requests import SHAPES, serve
from obdlab.peers.simulator.rules import NAMES

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from obdlab.lab.kinds.kind import Option, Point, Row, Value

#: The label of every row of this kind.
LABEL = "simulated"
_MBIT = 1e6 / 8
_ONCE = "once"
_COLD, _WARM, _WARM_ROOT = "cold", "warm", "warm root"
#: Options that older rows lack: with these values the model is as it was before them.
_ADDED: dict[str, Value] = {"leave_share": 0.0, "patience_s": 1.2}
# Seconds for a host, of starts at once and of a burst; every host that reads from the registry delays all others.
_HOST_S, _DIRECT_S = 0.003, 1.5e-5


class Simulation(Kind):
    """Containers that start together (``shape`` once) or as requests come (``iot``, ``synthetic``), by topology."""

    name: ClassVar[str] = "simulation"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "topology": ("rooted", "direct"),
        "hosts": (100,),
        "containers": (1.0,),
        "arity": (2,),
        "caches": (_COLD,),
        "shape": (_ONCE,),
    }
    options: ClassVar[Mapping[str, Value]] = {
        "timeline": "measured/timeline/redis.json",
        "block_kib": 512,
        "working_set_mb": 0.0,
        "up_mbit": 1000.0,
        "origin_mbit": 10_000.0,
        "root_mbit": 0.0,
        "rtt_ms": 0.5,
        "origin_rtt_ms": 2.0,
        "service_ms": 0.5,
        "origin_service_ms": 2.0,
        "unit_kib": 16,
        "cut_through": True,
        "slow_start": True,
        "cache_mb": 0.0,
        "local_ms": 130.0,
        "cores": 4,
        "within_s": 0.5,
        "noise": 0.1,
        "run_s": 2.0,
        "leave_share": 0.0,
        "patience_s": 1.2,
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("all_ready_s", "s"),
        Metric("median_s", "s"),
        Metric("slowest_s", "s"),
        Metric("spread_s", "s"),
        Metric("recovered_s", "s"),
        Metric("origin_mb", "MB"),
        Metric("peer_mb", "MB"),
        Metric("copies", ""),
        Metric("depth", ""),
        Metric("flows", ""),
        Metric("computed_s", "s"),
    )
    programs: ClassVar[Mapping[str, str]] = {}
    cell_timeout_s: ClassVar[float] = 3600.0
    seeded: ClassVar[bool] = True

    def checked(
        self, axes: Mapping[str, tuple[Value, ...]], options: Mapping[str, Option]
    ) -> tuple[Mapping[str, tuple[Value, ...]], Mapping[str, Option]]:
        """Return both. Raises SpecError for unknown names and for numbers that no simulation has."""
        known = {"topology": NAMES, "caches": (_COLD, _WARM_ROOT, _WARM), "shape": (_ONCE, *SHAPES)}
        for axis, names in known.items():
            for value in axes[axis]:
                if value not in names:
                    raise SpecError(f"axes.{axis}: unknown (got {value!r}, wanted one of {', '.join(names)})")
        for axis in ("hosts", "containers", "arity"):
            if min(float(value) for value in axes[axis]) <= 0:
                raise SpecError(f"axes.{axis}: wanted positive numbers (got {list(axes[axis])})")
        if not 0 <= float(options["leave_share"]) < 1:
            raise SpecError(f"options.leave_share: wanted a share below 1 (got {options['leave_share']})")
        if options["leave_share"] and set(axes["shape"]) != {_ONCE}:
            raise SpecError(f"options.leave_share: hosts leave only in starts of the shape {_ONCE!r}")
        try:
            site_of(options, _COLD)
        except SimulationError as error:
            raise SpecError(f"options: {error}") from error
        return axes, options

    def identity(self, options: Mapping[str, Option], point: Point) -> dict[str, Any]:
        """Return what identifies a cell; options that were added later count only with other values."""
        before = {key: value for key, value in options.items() if _ADDED.get(key) != value}
        return super().identity(before, point)

    def columns(self, options: Mapping[str, Option], point: Point) -> Row:
        """Return the point, and the label that no measured row has."""
        return {**super().columns(options, point), "label": LABEL}

    @contextmanager
    def _open(self, job: Job) -> Iterator[Bench]:
        workload = workload_of(job.options)
        yield _Simulator(workload, job.options)

    def estimate(
        self,
        axes: Mapping[str, tuple[Value, ...]],
        options: Mapping[str, Option],
        points: Sequence[Point],
        sizes: Mapping[str, int],
        disk_size: int,
    ) -> tuple[float, int]:
        """Return the seconds of computing; nothing is written."""
        hosts = [(float(point["hosts"]), point["topology"] == "direct") for point in points]
        return sum(_HOST_S * each + _DIRECT_S * each**2 * direct for each, direct in hosts), 0


class _Simulator(Bench):
    def __init__(self, workload: Workload, options: Mapping[str, Option]) -> None:
        self._workload, self._options = workload, options

    def measure(self, point: Point) -> Generator[Row]:
        """Simulate a point with the seed of its repeat."""
        began_s = time.process_time()
        try:
            numbers = _numbers(point, self._options, self._workload)
        except SimulationError as error:
            raise LabError(str(error)) from error
        yield {**numbers, "working_set": self._workload.size, "computed_s": time.process_time() - began_s}


def _numbers(point: Point, options: Mapping[str, Option], workload: Workload) -> dict[str, float]:
    seed, hosts = int(point["repeat"]), int(point["hosts"])
    site, topology = site_of(options, str(point["caches"])), str(point["topology"])
    arity, noise = int(point["arity"]), float(options["noise"])
    if point["shape"] == _ONCE:
        random = Random(f"starts {seed}")
        count = round(hosts * float(point["containers"]))
        starts_s = sorted(random.uniform(0, float(options["within_s"])) for _ in range(count))
        leaves = _leaves(hosts, float(options["leave_share"]), site, workload, seed)
        outcome = simulate(
            site, workload, topology, hosts, starts_s, seed=seed, arity=arity, noise=noise, leaves=leaves
        )
        times, recovered_s, all_ready_s = outcome.ready_s, 0.0, outcome.last_ready_s
    else:
        shape, run_s = SHAPES[str(point["shape"])], float(options["run_s"])
        requests_s = shape.times(seed)
        served = serve(site, workload, topology, hosts, requests_s, run_s, seed=seed, arity=arity, noise=noise)
        outcome = served.outcome
        times = [took for at, took in zip(served.times_s, served.response_s, strict=True) if at >= shape.begins_s]
        recovered_s, all_ready_s = served.recovered_s(shape.begins_s, run_s), outcome.ended_s
    return {
        "all_ready_s": all_ready_s,
        "median_s": median(times),
        "slowest_s": max(times),
        "spread_s": max(times) - min(times),
        "recovered_s": recovered_s,
        **_traffic(outcome),
    }


# Hosts that leave, at random times in which a start without peers' help would take place.
def _leaves(hosts: int, share: float, site: Site, workload: Workload, seed: int) -> list[tuple[float, int]]:
    random, alone_s = Random(f"leaves {seed}"), site.local_s + workload.think_s + workload.size / site.down
    return [(random.uniform(0, alone_s), number) for number in random.sample(range(hosts), round(share * hosts))]


def _traffic(outcome: Outcome) -> dict[str, float]:
    return {
        "origin_mb": outcome.origin_bytes / 1e6,
        "peer_mb": outcome.peer_bytes / 1e6,
        "copies": outcome.most_copies,
        "depth": outcome.depth,
        "flows": outcome.most_flows,
        "events": outcome.events,
        "containers_started": len(outcome.ready_s),
        "left": outcome.left,
        "moved_per_leave": outcome.moved / outcome.left if outcome.left else 0.0,
        "peak_sent_mb_s": outcome.peak_sent / 1e6,
        "peak_received_mb_s": outcome.peak_received / 1e6,
    }


def workload_of(options: Mapping[str, Option]) -> Workload:
    """Return the recorded start of the kind's options. Raises LabError."""
    path = find("experiments", Path(str(options["timeline"])))
    try:
        workload = Workload.from_timeline(json.loads(path.read_text()), int(options["block_kib"]) * 1024)
        size = round(float(options["working_set_mb"]) * 1e6)
        return workload.scaled(size) if size else workload
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}") from error
    except (ValueError, SimulationError) as error:
        raise LabError(f"{path}: {error}") from error


def site_of(options: Mapping[str, Option], caches: str = _COLD) -> Site:
    """Return the links and times of the kind's options. Raises SimulationError."""
    up, origin = float(options["up_mbit"]) * _MBIT, float(options["origin_mbit"]) * _MBIT
    if up <= 0 or origin <= 0 or float(options["run_s"]) <= 0 or min(options["within_s"], options["noise"]) < 0:
        raise SimulationError("up_mbit, origin_mbit and run_s are positive, within_s and noise not negative")
    return Site(
        up=up,
        down=up,
        origin_up=origin,
        root_up=float(options["root_mbit"]) * _MBIT,
        rtt_s=float(options["rtt_ms"]) / 1e3,
        origin_rtt_s=float(options["origin_rtt_ms"]) / 1e3,
        service_s=float(options["service_ms"]) / 1e3,
        origin_service_s=float(options["origin_service_ms"]) / 1e3,
        unit=int(options["unit_kib"]) * 1024,
        cut_through=bool(options["cut_through"]),
        window=14600 if options["slow_start"] else 0,
        cache_bytes=round(float(options["cache_mb"]) * 1e6),
        local_s=float(options["local_ms"]) / 1e3,
        cores=int(options["cores"]),
        patience_s=float(options["patience_s"]),
        warm_root=caches == _WARM_ROOT,
        warm=caches == _WARM,
    )
