"""The kind's model fitted to synthetic rows of a swarm, of known parameters and noise."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import pytest

from obdlab.lab.kinds import KINDS
from obdlab.lab.kinds.fitted import fit_swarm
from obdlab.lab.kinds.simulation import site_of, workload_of
from obdlab.peers.simulator import simulate

#: Slow links, as a swarm on one machine has.
OPTIONS = {**KINDS["simulation"].options, "block_kib": 1024, "up_mbit": 100.0, "origin_mbit": 200.0}


def rows(noise: float, **true: float) -> list[dict[str, Any]]:
    site, workload, random = site_of(OPTIONS), workload_of(OPTIONS), Random(5)
    share = true.pop("share")
    site = dataclasses.replace(site, up=share * site.up, down=share * site.down, **true)
    found = []
    for topology in ("balanced", "direct"):
        for hosts in (1, 2, 4, 8, 16, 32):
            ready_s = simulate(site, workload, topology, hosts, [0.0] * hosts, seed=0).ready_s
            median_s = sorted(ready_s)[hosts // 2]
            about = {"topology": topology, "hosts": hosts}
            found += [{**about, "median_s": median_s * random.lognormvariate(0, noise)} for _ in range(5)]
    return found


def test_a_swarms_parameters_are_found_and_more_hosts_predicted() -> None:
    found = fit_swarm([*rows(0.03, share=0.8, service_s=0.006, local_s=0.5), {"error": "lost"}], OPTIONS)
    assert found.parameters["share"] == pytest.approx(0.8, rel=0.15)
    assert found.is_enough
    assert {(each.topology, each.hosts) for each in found.asked} == {
        (topology, hosts) for topology in ("balanced", "direct") for hosts in (16, 32)
    }
