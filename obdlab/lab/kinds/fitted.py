"""The simulation fitted to rows of a swarm, so that a projection can say how wrong the model is."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from obdlab.lab.kinds.simulation import Simulation, site_of, workload_of
from obdlab.peers.simulator import simulate
from obdlab.peers.simulator.fitting import Fit, Observation, fit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from obdlab.lab.kinds.kind import Option, Row

#: Where the fit begins: a request's time in an agent, in seconds.
_SERVICE_S = 0.002


def fit_swarm(rows: Sequence[Row], options: Mapping[str, Option], time_key: str = "median_s") -> Fit:
    """Fit the model to rows with ``topology``, ``hosts`` and a start's seconds; ask it for 16 and 32 hosts.

    Links are the declared ones (``options`` are those of the kinds "swarm" or "simulation"), as a swarm's are shaped.
    Fitted are the time that an agent needs for a request, that of a start before its first read, and the share of the
    declared rate that a host's link gives. Raises SimulationError and LabError.
    """
    known = {**Simulation.options, **{key: value for key, value in options.items() if key in Simulation.options}}
    slower = float(options.get("slower", 1.0))
    workload, site, arity = workload_of(known).stretched(slower), site_of(known), int(options.get("arity", 2))

    def model(values: Mapping[str, float], topology: str, hosts: int) -> float:
        rate = site.up * values["share"]
        changed = replace(site, up=rate, down=rate, service_s=values["service_s"], local_s=values["local_s"])
        starts_s = [0.0] * hosts
        return median(simulate(changed, workload, topology, hosts, starts_s, seed=0, arity=arity).ready_s)

    observations = [
        Observation(str(row["topology"]), int(row["hosts"]), float(row[time_key]))
        for row in rows
        if not row.get("error")
    ]
    local_s = max(site.local_s * slower, 0.01)
    return fit(observations, model, {"service_s": _SERVICE_S, "local_s": local_s, "share": 0.9})
