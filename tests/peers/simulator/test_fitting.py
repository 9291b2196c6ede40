"""Fits to rows of swarms with known parameters and noise."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest

from obdlab.peers.simulator import SimulationError, Site, Workload, simulate
from obdlab.peers.simulator.fitting import ASKED, ENOUGH, FITTED, Observation, fit

TRUE = {"up": 12e6, "service_s": 0.004, "local_s": 0.15}
FIRST = {"up": 5e6, "service_s": 0.001, "local_s": 0.4}
WORKLOAD = Workload.even(12, 200_000, 0.005)


def model(values: Mapping[str, float], topology: str, hosts: int) -> float:
    site = Site(
        up=values["up"], down=values["up"], origin_up=2 * values["up"],
        service_s=values["service_s"], local_s=values["local_s"],
    )  # fmt: skip
    ready = simulate(site, WORKLOAD, topology, hosts, [0.0] * hosts, seed=1).ready_s
    return sorted(ready)[len(ready) // 2]


def rows(noise: float, seed: int = 3, bend: float = 0.0) -> list[Observation]:
    """Synthetic rows: the true model's times, each with noise; ``bend`` adds seconds for each host."""
    random = Random(seed)
    return [
        Observation(topology, hosts, model(TRUE, topology, hosts) * random.lognormvariate(0, noise) + bend * hosts)
        for topology in ("rooted", "direct")
        for hosts in (*FITTED, *ASKED)
        for _ in range(7)
    ]


def test_known_parameters_are_found_without_noise() -> None:
    found = fit(rows(0.0), model, FIRST)
    assert found.parameters == pytest.approx(TRUE, rel=0.05)
    assert found.error is not None
    assert found.error < 0.01
    assert {each.hosts for each in found.fitted} == set(FITTED)
    assert {each.hosts for each in found.asked} == set(ASKED)


@pytest.mark.parametrize("seed", [1, 2])
def test_noise_of_a_measurement_leaves_the_prediction_within_bounds(seed: int) -> None:
    found = fit(rows(0.05, seed), model, FIRST)
    assert found.is_enough
    assert found.parameters["up"] == pytest.approx(TRUE["up"], rel=0.2)


def test_hosts_that_are_slower_than_the_model_refute_it() -> None:
    # Something that the model lacks grows with the hosts: few hosts can be fitted, more can't be predicted.
    found = fit(rows(0.0, bend=0.06), model, FIRST)
    assert not found.is_enough
    assert found.error is not None
    assert found.error > ENOUGH


def test_only_few_hosts_fit() -> None:
    kept = fit(rows(0.0), model, FIRST)
    wrong = [
        Observation(each.topology, each.hosts, each.seconds * (3 if each.hosts in ASKED else 1)) for each in rows(0.0)
    ]
    other = fit(wrong, model, FIRST)
    assert other.parameters == kept.parameters
    assert other.error == pytest.approx(2 / 3, rel=0.05)
    without = fit([each for each in rows(0.0) if each.hosts in FITTED], model, FIRST)
    assert without.error is None
    assert not without.is_enough


def test_errors() -> None:
    with pytest.raises(SimulationError, match="a point for each of 3"):
        fit([Observation("rooted", 1, 1.0)], model, FIRST)
    with pytest.raises(SimulationError, match="positive"):
        fit(rows(0.0), model, {"up": 0.0})


def test_the_last_digits_of_a_machine_change_nothing() -> None:
    asked: list[tuple[float, ...]] = []

    def noted(values: Mapping[str, float], topology: str, hosts: int) -> float:
        asked.append(tuple(values.values()))
        return model(values, topology, hosts)

    observations = rows(0.05)
    found = fit(observations, noted, FIRST)
    first = asked.copy()
    asked.clear()
    assert fit(observations, noted, {name: value * (1 + 1e-13) for name, value in FIRST.items()}) == found
    assert asked == first
