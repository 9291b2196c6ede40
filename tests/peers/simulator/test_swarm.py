"""Starts of swarms: formulas of trees, conserved bytes, all topologies, the same outcome for the same seed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.peers.simulator import Outcome, SimulationError, Site, Step, Workload, simulate
from obdlab.peers.simulator.rules import NAMES

SIZE, UP, UNIT = 512_000, 125e6, 16_000
#: No slow start, no other time than links and round trips.
PLAIN = Site(up=UP, down=UP, origin_up=UP, unit=UNIT, window=0, rtt_s=0.002, origin_rtt_s=0.01, service_s=0.001)
ONE = Workload.even(1, SIZE)
#: Three layers, reads that overlap, time between them.
MIXED = Workload(
    (Step(0.01, (0, 1)), Step(0.0, (2,)), Step(0.02, (1, 3, 4)), Step(0.005, (5,))),
    (50_000, 200_000, 130_000, 1000, 90_000, 300_000),
    (0, 0, 1, 2, 2, 1),
)


def start(topology: str, hosts: int, workload: Workload = ONE, starts: int = 0, **more: Any) -> Outcome:
    changes = {key: more.pop(key) for key in list(more) if key in Site.__dataclass_fields__}
    site = dataclasses.replace(PLAIN, **changes)
    return simulate(site, workload, topology, hosts, [0.0] * (starts or hosts), **{"seed": 1, **more})


def test_one_host_reads_from_the_registry() -> None:
    outcome = start("direct", 1)
    assert outcome.ready_s == pytest.approx([0.01 + PLAIN.origin_service_s + SIZE / UP])
    assert (outcome.origin_bytes, outcome.peer_bytes, outcome.depth) == (SIZE, 0, 1)


def test_all_hosts_share_the_registrys_link() -> None:
    outcome = start("direct", 40, Workload.even(3, SIZE))
    # Request after request of each host; the link is never idle but for a round trip and the service between blocks.
    assert outcome.ready_s == pytest.approx([3 * (0.01 + PLAIN.origin_service_s + 40 * SIZE / UP)] * 40)
    assert outcome.origin_bytes == 40 * 3 * SIZE


@pytest.mark.parametrize("depth", [1, 2, 5, 9])
def test_a_chain_with_and_without_cut_through(depth: int) -> None:
    # rooted, arity 1: registry - root - host 0 - host 1 ...; the last host's block crosses depth + 1 links.
    asked = depth * (PLAIN.rtt_s / 2 + PLAIN.service_s) + PLAIN.origin_rtt_s / 2 + PLAIN.origin_service_s
    back = depth * PLAIN.rtt_s / 2 + PLAIN.origin_rtt_s / 2
    joined = PLAIN.rtt_s  # all at the same time
    stored = start("rooted", depth, arity=1, cut_through=False).ready_s[-1]
    # Only the last host's way up is long if it is the first to ask: here all ask at once, so a request finds the
    # flight of the host above after one hop, and the root's request was the first.
    first = PLAIN.rtt_s / 2 + PLAIN.service_s + PLAIN.origin_rtt_s / 2 + PLAIN.origin_service_s
    assert stored == pytest.approx(joined + first + back + (depth + 1) * SIZE / UP)
    streamed = start("rooted", depth, arity=1).ready_s[-1]
    assert streamed == pytest.approx(joined + first + back + SIZE / UP + depth * UNIT / UP)
    assert first <= asked


@pytest.mark.parametrize("depth", [1, 4])
def test_a_block_is_nowhere_before_it_has_come_in_above(depth: int) -> None:
    # The registry is ten times slower than the hosts: they pass each unit on at once, and no byte sooner.
    ready = start("rooted", depth, arity=1, origin_up=UP / 10).ready_s
    first = PLAIN.rtt_s + PLAIN.rtt_s / 2 + PLAIN.service_s + PLAIN.origin_rtt_s + PLAIN.origin_service_s
    above = first + SIZE / (UP / 10)
    assert ready == pytest.approx([above + hops * (PLAIN.rtt_s / 2 + UNIT / UP) for hops in range(1, depth + 1)])


@pytest.mark.parametrize("arity", [2, 3, 5])
def test_two_levels_of_a_tree(arity: int) -> None:
    # Below the root come arity hosts, and arity hosts below each: each uplink is shared by arity flows.
    hosts = arity + arity * arity
    first = PLAIN.rtt_s / 2 + PLAIN.service_s + PLAIN.origin_rtt_s / 2 + PLAIN.origin_service_s + PLAIN.rtt_s
    # Requests of siblings are served one after the other; the last one of them is as late as that.
    spread = (arity - 1) * PLAIN.service_s
    stored = max(start("rooted", hosts, arity=arity, cut_through=False).ready_s)
    wanted = first + PLAIN.origin_rtt_s / 2 + SIZE / UP + 2 * (PLAIN.rtt_s / 2 + arity * SIZE / UP)
    assert wanted <= stored <= wanted + 2 * spread
    streamed = max(start("rooted", hosts, arity=arity).ready_s)
    wanted = first + PLAIN.origin_rtt_s / 2 + UNIT / UP + PLAIN.rtt_s + arity * (SIZE + UNIT) / UP
    assert wanted - 1e-9 <= streamed <= wanted + 2 * spread


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut_through", [True, False])
def test_every_host_gets_each_byte_once(name: str, cut_through: bool) -> None:
    hosts = 30
    outcome = start(name, hosts, MIXED, starts=2 * hosts + 1, cut_through=cut_through, window=14600)
    has_root = name in ("rooted", "redirect")
    assert outcome.origin_bytes + outcome.peer_bytes == (hosts + has_root) * MIXED.size
    # One copy of each block leaves the registry, however many hosts there are, unless nothing is shared.
    assert outcome.most_copies == (hosts if name == "direct" else 1)
    assert outcome.origin_bytes == (hosts if name == "direct" else 1) * MIXED.size
    assert outcome.depth >= (1 if name in ("direct", "rendezvous") else 3)
    assert len(outcome.ready_s) == 2 * hosts + 1
    slowest = max(1.0, 3 / PLAIN.cores)
    assert min(outcome.ready_s) >= slowest * MIXED.think_s
    assert outcome == start(name, hosts, MIXED, starts=2 * hosts + 1, cut_through=cut_through, window=14600)


@settings(max_examples=60)
@given(
    name=st.sampled_from(NAMES),
    hosts=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 400_000), min_size=1, max_size=6),
    cache=st.integers(0, 700_000),
    seed=st.integers(0, 3),
    cut_through=st.booleans(),
)
def test_bytes_are_conserved_in_any_swarm(
    name: str, hosts: int, sizes: list[int], cache: int, seed: int, cut_through: bool
) -> None:
    blocks = range(len(sizes))
    workload = Workload(
        tuple(Step(0.001 * each, (each, *blocks[:each:2])) for each in blocks),
        tuple(sizes),
        tuple(n % 2 for n in blocks),
    )
    outcome = start(name, hosts, workload, seed=seed, cache_bytes=cache, cut_through=cut_through, noise=0.1)
    holders = hosts + (name in ("rooted", "redirect"))
    moved = outcome.origin_bytes + outcome.peer_bytes
    if cache == 0 or cache >= workload.size:
        assert moved == holders * workload.size
    else:  # blocks that were evicted come again
        assert moved >= holders * workload.size
    # A start takes at least its own time and its bytes over the host's link, and no longer than all bytes in turn.
    assert min(outcome.ready_s) > workload.size / UP


def test_more_bandwidth_or_less_work_is_never_slower() -> None:
    def slowest(**more: Any) -> float:
        return max(start("balanced", 63, MIXED, **more).ready_s)

    usual = slowest()
    for changes in (
        {"up": 2 * UP, "down": 2 * UP}, {"rtt_s": 0.0001}, {"service_s": 0.0001}, {"origin_up": 2 * UP},
        {"cut_through": True}, {"warm": True},
    ):  # fmt: skip
        assert slowest(**changes) <= usual + 1e-9, changes
    for changes in ({"up": UP / 2}, {"rtt_s": 0.01}, {"service_s": 0.01}, {"cut_through": False}, {"window": 14600}):
        assert slowest(**changes) > usual, changes


def test_the_tree_is_flat_and_the_control_is_not() -> None:
    workload = Workload.even(20, SIZE)
    tree = [max(start("rooted", hosts, workload).ready_s) for hosts in (8, 64, 512)]
    control = [max(start("direct", hosts, workload).ready_s) for hosts in (8, 64, 512)]
    # A block costs its hops only while the pipe fills; here each read waits for the one before, so hops count.
    assert tree[2] / tree[0] < 2.5
    assert control[2] / control[0] > 30


def test_warm_hosts_move_nothing() -> None:
    outcome = start("rooted", 10, MIXED, warm=True, local_s=0.1)
    assert outcome.ready_s == pytest.approx([0.1 + MIXED.think_s] * 10)
    assert outcome.origin_bytes == outcome.peer_bytes == 0
    warm_root = start("rooted", 10, MIXED, warm_root=True)
    assert warm_root.origin_bytes == 0
    assert warm_root.peer_bytes == 10 * MIXED.size


def test_containers_of_a_host_share_its_cores_and_its_cache() -> None:
    outcome = start("direct", 2, MIXED, starts=16, warm=True, cores=4)
    assert outcome.ready_s == pytest.approx([2 * MIXED.think_s] * 16)
    assert start("direct", 2, MIXED, starts=16).origin_bytes == 2 * MIXED.size


def test_a_small_cache_fetches_again() -> None:
    twice = dataclasses.replace(MIXED, steps=MIXED.steps * 2)
    whole = start("rooted", 5, twice)
    small = start("rooted", 5, twice, cache_bytes=320_000)
    assert whole.origin_bytes == MIXED.size
    assert small.origin_bytes > MIXED.size
    assert small.peer_bytes > whole.peer_bytes


def test_slow_start_costs_round_trips_of_a_new_connection_only() -> None:
    quick = start("direct", 1, Workload.even(2, SIZE)).ready_s[0]
    slow = start("direct", 1, Workload.even(2, SIZE), window=14600).ready_s[0]
    # 1.46 MB/s at first, doubled each 10 ms up to 125 MB/s: the bytes of a full pipe are there after 6 more.
    sent = 0.0
    rate, rounds = 14600 / 0.01, 0
    while sent + rate * 0.01 < SIZE:
        sent, rate, rounds = sent + rate * 0.01, 2 * rate, rounds + 1
    first = rounds * 0.01 + (SIZE - sent) / rate
    assert slow > quick
    assert slow == pytest.approx(quick + first - SIZE / UP, rel=0.1)


def test_few_flows_a_host() -> None:
    for name, most in (("rooted", 6), ("balanced", 3), ("redirect", 3 * 3), ("rendezvous", 3 * 3)):
        assert start(name, 200, MIXED).most_flows <= most, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topology": "ring"}, "topology: unknown"),
        ({"hosts": 0}, "0 hosts"),
        ({"topology": "balanced", "arity": 3}, "binary"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_invalid_values_are_named(changes: dict[str, Any], words: str) -> None:
    given = {"topology": "rooted", "hosts": 2, "starts": 2, **changes}
    with pytest.raises(SimulationError, match=words):
        start(given.pop("topology"), given.pop("hosts"), **given)
    with pytest.raises(SimulationError, match="no negative value"):
        Site(rtt_s=-1)


def test_a_simulation_ends() -> None:
    with pytest.raises(SimulationError, match="not finished"):
        start("rooted", 3, until_s=0.01)


#: A start that takes a while, so that hosts can leave in the middle.
LONG = Workload.even(20, 200_000, 0.02)


@pytest.mark.parametrize("topology", NAMES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_hosts_that_leave_keep_no_other_from_its_start(topology: str, data: st.DataObject) -> None:
    hosts = data.draw(st.integers(2, 24))
    gone = data.draw(st.sets(st.integers(0, hosts - 1), max_size=hosts - 1))
    leaves = [(data.draw(st.floats(0, 1.5)), number) for number in sorted(gone)]
    outcome = start(topology, hosts, LONG, leaves=leaves)
    assert outcome.left == len(gone)
    # A start that was over before its host left counts.
    assert hosts - len(gone) <= len(outcome.ready_s) <= hosts
    assert outcome == start(topology, hosts, LONG, leaves=leaves)


def test_a_parent_that_leaves_costs_the_patience_once() -> None:
    # registry - root - host 0 - host 1, a chain
    alone = start("rooted", 2, LONG, arity=1)
    # The first block is on its way then.
    both = start("rooted", 2, LONG, arity=1, leaves=[(0.03, 0)])
    (took,) = both.ready_s
    assert (both.left, both.moved) == (1, 1)
    assert alone.ready_s[1] + PLAIN.patience_s - 0.05 < took < alone.ready_s[1] + PLAIN.patience_s + 0.05
    assert both.origin_bytes == LONG.size


def test_a_host_that_leaves_after_all_starts_changes_nothing() -> None:
    for topology in NAMES:
        ready_s = start(topology, 10, LONG).ready_s
        assert start(topology, 10, LONG, leaves=[(100.0, 3)]).ready_s == ready_s


def test_only_hosts_that_are_there_leave_and_once() -> None:
    for leaves in ([(0.0, 5)], [(-1.0, 0)], [(0.0, 1), (1.0, 1)]):
        with pytest.raises(SimulationError, match="leaves"):
            start("rooted", 5, leaves=leaves)


def test_a_nodes_peak_is_its_bytes_in_a_second() -> None:
    outcome = start("rooted", 7, LONG, up=2e6, down=2e6)
    # Two children share the uplink: twice the bytes go out that come in.
    assert 1.5e6 < outcome.peak_sent <= 2.2e6
    assert 0.8e6 < outcome.peak_received <= 1.4e6
