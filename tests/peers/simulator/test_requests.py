"""Requests to a function whose containers start as they are needed."""

from __future__ import annotations

import dataclasses

import pytest

from obdlab.peers.simulator import SimulationError, Site, Workload
from obdlab.peers.simulator.requests import SHAPES, Served, Shape, serve

SITE = Site(up=125e6, down=125e6, warm=True, local_s=1.0)
WORKLOAD = Workload.even(4, 1_000_000)


def served(requests_s: list[float], hosts: int = 10, site: Site = SITE) -> Served:
    return serve(site, WORKLOAD, "balanced", hosts, requests_s, 2.0, seed=1)


def test_a_request_waits_for_a_container_or_takes_an_idle_one() -> None:
    found = served([0.0, 4.0, 4.5, 20.0])
    # Start and run; an idle container; another is started; both are idle.
    assert found.response_s == pytest.approx([3.0, 2.0, 3.0, 2.0])
    assert len(found.outcome.ready_s) == 2


def test_a_request_takes_the_first_container_that_is_free() -> None:
    # Its own starts until 2.5; the first request's is free at 3.0, the third one's start is no sooner.
    found = served([0.0, 1.5, 2.9])
    assert found.response_s == pytest.approx([3.0, 3.0, 0.1 + 2.0])


def test_a_full_pool_queues() -> None:
    found = served([0.0, 0.0, 0.0], hosts=1)
    assert found.response_s == pytest.approx([3.0, 5.0, 7.0])


def test_recovery_is_the_last_slow_request() -> None:
    found = served([0.0, 10.0, 10.5, 11.0, 30.0])
    assert found.recovered_s(10.0, 1.9) == pytest.approx(1.0)
    assert found.recovered_s(10.0, 2.5) == 0.0
    assert found.recovered_s(12.0, 2.0) == 0.0


def test_a_cold_burst_recovers_sooner_from_peers() -> None:
    site = dataclasses.replace(SITE, warm=False, origin_up=125e6)
    times = Shape(2.0, 40.0, 20.0, 60.0).times(3)
    tree, control = (
        serve(site, Workload.even(8, 2_000_000), name, 200, times, 2.0, seed=1) for name in ("balanced", "direct")
    )
    assert tree.recovered_s(20.0, 2.0) < control.recovered_s(20.0, 2.0)
    assert tree.outcome.origin_bytes < control.outcome.origin_bytes / 20
    again = serve(site, Workload.even(8, 2_000_000), "balanced", 200, times, 2.0, seed=1)
    assert again.response_s == tree.response_s


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_their_rates(name: str) -> None:
    shape = SHAPES[name]
    times = shape.times(7)
    assert times == sorted(times) == shape.times(7) != shape.times(8)
    burst = [at for at in times if at >= shape.begins_s]
    wanted = shape.burst * (shape.ends_s - shape.begins_s)
    assert len(burst) == pytest.approx(wanted, abs=5 * wanted**0.5)
    assert len(times) - len(burst) == pytest.approx(shape.usual * shape.begins_s, abs=5 * (30 * shape.usual) ** 0.5)


def test_errors() -> None:
    with pytest.raises(SimulationError, match="wanted hosts, requests"):
        served([])
