"""Rates of flows against a slow reference, times against formulas."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.peers.simulator import Site, Workload, simulate
from obdlab.peers.simulator.eventqueue import Events, SimulationError
from obdlab.peers.simulator.network import PACE_S, Flow, Link, Network

#: A flow's two links by number, its limit (0: none), its start, its bytes.
FLOW = st.tuples(
    st.integers(0, 4), st.integers(0, 4), st.sampled_from([0, 0, 3, 8]), st.integers(0, 30), st.integers(1, 90)
)


def fair(
    capacities: dict[object, Fraction], flows: dict[int, tuple[object, object, Fraction | None]]
) -> dict[int, Fraction]:
    """Fill step by step, exactly: all rates grow alike until a link is full or a flow is at its limit."""
    rates = dict.fromkeys(flows, Fraction(0))
    growing = set(flows)
    while growing:
        room = []
        for link, capacity in capacities.items():
            used = sum((rates[key] for key, (up, down, _) in flows.items() if link in (up, down)), Fraction(0))
            count = sum(link in flows[key][:2] for key in growing)
            room += [(capacity - used) / count] if count else []
        room += [limit - rates[key] for key in growing if (limit := flows[key][2]) is not None]
        step = min(room)
        for key in growing:
            rates[key] += step
        full = {
            link
            for link, capacity in capacities.items()
            if sum((rates[key] for key, (up, down, _) in flows.items() if link in (up, down)), Fraction(0))
            >= capacity
        }
        growing = {
            key
            for key in growing
            if not full & {*flows[key][:2]} and (flows[key][2] is None or rates[key] < flows[key][2])
        }
    return rates


class Run:
    """Flows that are started at their times; after each change the rates are compared with the reference's."""

    def __init__(self, ups: list[int], downs: list[int], flows: list[tuple[int, int, int, int, int]]) -> None:
        self.events = Events()
        self.network = Network(self.events)
        self.ups, self.downs = [Link(float(c)) for c in ups], [Link(float(c)) for c in downs]
        self.flows: dict[int, Flow] = {}
        self.ended: dict[int, float] = {}
        self.moved = dict.fromkeys(range(len(flows)), 0.0)
        self.last = 0.0
        for number, (up, down, limit, start, size) in enumerate(flows):
            flow = Flow(self.ups[up], self.downs[down], self.done, float(limit) if limit else float("inf"))
            self.flows[number] = flow
            self.events.at(float(start), lambda n, size=size: self.network.start(self.flows[n], float(size)), number)

    def done(self, flow: Flow) -> None:
        (number,) = (key for key, value in self.flows.items() if value is flow)
        self.ended[number] = self.events.now
        self.network.stop(flow)

    def settle(self) -> None:
        self.network.settle()
        links: dict[object, Fraction] = {link: Fraction(link.capacity) for link in self.ups + self.downs}
        active = {
            key: (flow.up, flow.down, None if flow.limit == float("inf") else Fraction(flow.limit))
            for key, flow in self.flows.items()
            if flow in flow.up.flows
        }
        wanted = fair(links, active)
        for key, rate in wanted.items():
            assert self.flows[key].rate == pytest.approx(float(rate), rel=1e-6)
        for link in self.ups + self.downs:
            assert link.load == pytest.approx(sum(flow.rate for flow in link.flows), abs=1e-6)
            assert link.load <= link.capacity * (1 + 1e-6)


@settings(max_examples=150)
@given(
    ups=st.lists(st.integers(1, 20), min_size=5, max_size=5),
    downs=st.lists(st.integers(1, 20), min_size=5, max_size=5),
    flows=st.lists(FLOW, min_size=1, max_size=14),
)
def test_rates_are_max_min_fair_after_every_change(
    ups: list[int], downs: list[int], flows: list[tuple[int, int, int, int, int]]
) -> None:
    run = Run(ups, downs, flows)
    run.events.run(run.settle)
    assert run.ended.keys() == run.flows.keys()
    for number, (up, down, limit, start, size) in enumerate(flows):
        fastest = min(ups[up], downs[down], limit or 1000)
        assert run.ended[number] >= start + size / fastest - 1e-6


@pytest.mark.parametrize("count", [1, 3, 50, 200])
def test_flows_on_one_link_end_together(count: int) -> None:
    run = Run([100], [10_000], [(0, 0, 0, 0, 500)] * count)
    # More flows than are rated exactly start at the same time, so that they are rated at once all the same.
    run.events.run(run.network.settle)
    assert list(run.ended.values()) == pytest.approx([count * 5.0] * count)


def test_short_flows_leave_their_share_to_long_ones() -> None:
    # 100 B/s for sizes 100, 200, 300: after 3 s the first is done, then two share, then one has it all.
    run = Run([100], [10_000], [(0, 0, 0, 0, size) for size in (100, 200, 300)])
    run.events.run(run.settle)
    assert [run.ended[number] for number in range(3)] == pytest.approx([3.0, 5.0, 6.0])


def test_a_crowded_link_moves_all_bytes_at_its_capacity() -> None:
    # Rated now and then only: the link may idle while a share waits to be given away, never be overfull.
    sizes = [1000 + 7 * number for number in range(300)]
    run = Run([100_000], [10**9], [(0, 0, 0, number % 3, size) for number, size in enumerate(sizes)])
    run.events.run(run.network.settle)
    least = sum(sizes) / 100_000
    assert least - 1e-6 <= max(run.ended.values()) <= 1.02 * least + 2
    ends = [run.ended[number] for number in range(0, 300, 3)]
    assert all(first <= second for first, second in pairwise(ends))


def test_rating_a_crowded_link_now_and_then_changes_little() -> None:
    workload = Workload.even(10, 280_000, 0.002)
    starts_s = [number / 4000 for number in range(200)]
    ends = {}
    for exact in (64, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Network.__init__, "__defaults__", (exact, PACE_S))
            ends[exact] = simulate(Site(), workload, "direct", 200, starts_s, seed=1, noise=0.1)
    assert ends[64].events < ends[1000].events / 5
    assert max(ends[64].ready_s) == pytest.approx(max(ends[1000].ready_s), rel=0.03)
    assert ends[64].origin_bytes == ends[1000].origin_bytes


def test_a_limit_that_rises() -> None:
    run = Run([100], [100], [(0, 0, 10, 0, 500)])
    run.events.at(10.0, lambda _: run.network.relimit(run.flows[0], 20.0), None)
    run.events.at(15.0, lambda _: run.network.relimit(run.flows[0], float("inf")), None)
    run.events.run(run.settle)
    assert run.ended[0] == pytest.approx(15 + 300 / 100)


def test_errors() -> None:
    with pytest.raises(SimulationError, match="positive capacity"):
        Link(0)
    events = Events()
    events.at(5.0, print, "")
    with pytest.raises(SimulationError, match="not finished after 4"):
        events.run(lambda: None, until=4.0)
