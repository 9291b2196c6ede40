"""Laws of all topologies under random joins, requests and leaves: no loops, few children, a way to the root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.peers.topology import BalancedTree, Direct, Group, RedirectTree, Rendezvous, RootedTree, Topology

GROUP = Group("sha256:aa")
MAKERS: dict[str, Callable[[], Topology]] = {
    "direct": Direct,
    "rooted": lambda: RootedTree("root", 3, 100.0),
    "redirect": lambda: RedirectTree("root", Random(7)),
    "balanced": BalancedTree,
    "rendezvous": Rendezvous,
}
MOST = {"direct": 0, "rooted": 3, "redirect": 2, "balanced": 2, "rendezvous": 2}
STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.sampled_from([0, 1, 20, 70])), max_size=80)


def depth(parents: dict[str, str | None], host: str) -> int:
    steps = 0
    while (above := parents.get(host)) is not None:
        steps += 1
        assert steps <= len(parents), f"loop at {host}"
        assert above in parents or above == "root"
        host = above
    return steps


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_each_host_reaches_the_root_and_leaves_name_the_moved(kind: str, steps: list[tuple[bool, int, int]]) -> None:
    topology, again, now = MAKERS[kind](), MAKERS[kind](), 0.0
    for joins, number, wait in steps:
        now += wait
        host, before = f"host-{number}", topology.parents(GROUP, now)
        if joins:
            parent = topology.join(GROUP, host, now)
            assert again.join(GROUP, host, now) == parent
            assert topology.parents(GROUP, now)[host] == parent
            if host in before and kind != "rendezvous":
                assert parent == before[host]  # a request does not move a host
        else:
            moved = topology.leave(GROUP, host, now)
            assert again.leave(GROUP, host, now) == moved
            after = topology.parents(GROUP, now)
            assert after.keys() == before.keys() - {host}
            changed = {name for name in after if after[name] != before[name]}
            assert changed <= set(moved)
            assert set(moved) - changed <= {name for name in before if before[name] == host}
        parents = topology.parents(GROUP, now)
        assert parents == again.parents(GROUP, now)
        children = Counter(parent for parent in parents.values() if parent is not None)
        assert max(children.values(), default=0) <= MOST[kind]
        for name in parents:
            depth(parents, name)
        if kind in ("balanced", "rendezvous") and parents:
            assert list(parents.values()).count(None) == 1


@pytest.mark.parametrize(("kind", "expiry"), [("rooted", 100.0), ("redirect", 60.0)])
def test_place_is_lost_after_the_expiry_and_kept_by_requests(kind: str, expiry: float) -> None:
    topology = MAKERS[kind]()
    topology.join(GROUP, "idle", 0.0)
    topology.join(GROUP, "busy", 0.0)
    topology.join(GROUP, "busy", expiry - 1)
    assert set(topology.parents(GROUP, expiry - 0.5)) == {"idle", "busy"}
    assert topology.parents(GROUP, expiry) == {"busy": "root"}
    assert topology.parents(Group("another"), expiry) == {}
    assert topology.parents(GROUP, 2 * expiry) == {}


def test_rooted_tree_fills_level_by_level() -> None:
    topology = RootedTree("root", 2)
    hosts = [f"h{number}" for number in range(6)]
    assert [topology.join(GROUP, host, 0.0) for host in hosts] == ["root", "root", "h0", "h0", "h1", "h1"]
    assert topology.leave(GROUP, "h0", 1.0) == ("h2", "h3")
    assert topology.parents(GROUP, 1.0) == {"h1": "root", "h2": "root", "h3": "h2", "h4": "h1", "h5": "h1"}


def test_redirect_tree_sends_the_third_child_on() -> None:
    topology = RedirectTree("root", Random(1))
    assert [topology.join(GROUP, host, 0.0) for host in "abc"][:2] == ["root", "root"]
    assert topology.parents(GROUP, 0.0)["c"] in ("a", "b")


def test_redirect_tree_is_about_as_deep_as_measured_elsewhere() -> None:
    means = []
    for seed in range(20):
        topology = RedirectTree("root", Random(seed))
        for number in range(1000):
            topology.join(GROUP, str(number), 0.0)
        parents = topology.parents(GROUP, 0.0)
        means.append(sum(depth(parents, host) for host in parents) / 1000)
    assert sum(means) / 20 == pytest.approx(8.2, abs=0.4)


def heights(parents: dict[str, str | None]) -> int:
    children: dict[str | None, list[str]] = {}
    for host, parent in parents.items():
        children.setdefault(parent, []).append(host)

    def height(host: str) -> int:
        below = sorted([*map(height, children.get(host, [])), -1, -1], reverse=True)[:2]
        assert below[0] - below[1] <= 1, f"{host} out of balance"
        return 1 + below[0]

    return height(children[None][0])


def test_balanced_tree_stays_balanced_and_moves_few() -> None:
    random, moved, leaves = Random(3), 0, 0
    topology = BalancedTree()
    for number in range(1000):
        topology.join(GROUP, str(number), 0.0)
    assert heights(topology.parents(GROUP, 0.0)) == 9
    topology = BalancedTree()
    present = [str(number) for number in range(300)]
    for host in present:
        topology.join(GROUP, host, 0.0)
    # As many joins as leaves: in a tree that only shrinks the mean is higher.
    for number in range(300, 2300):
        if random.random() < 0.5:
            topology.join(GROUP, str(number), 0.0)
            present.append(str(number))
        else:
            moved += len(topology.leave(GROUP, present.pop(random.randrange(len(present))), 0.0))
            leaves += 1
        heights(topology.parents(GROUP, 0.0))
    assert 1.0 < moved / leaves <= 1.4


def test_balanced_trees_root_with_one_child_hands_over() -> None:
    topology = BalancedTree()
    topology.join(GROUP, "a", 0.0)
    topology.join(GROUP, "b", 0.0)
    assert topology.leave(GROUP, "a", 0.0) == ("b",)
    assert topology.parents(GROUP, 0.0) == {"b": None}
    assert topology.join(GROUP, "c", 0.0) == "b"


@pytest.mark.parametrize("make", [lambda: RootedTree("r", 0), lambda: RedirectTree("r", Random(0), expiry=0)])
def test_impossible_trees_are_refused(make: Callable[[], Topology]) -> None:
    with pytest.raises(ValueError, match="tree below r: wanted"):
        make()


def test_request_in_the_redirect_tree_renews_the_places_above() -> None:
    topology = RedirectTree("root", Random(1), most_children=1)
    for host in "abc":
        topology.join(GROUP, host, 0.0)
    topology.join(GROUP, "c", 50.0)
    assert topology.parents(GROUP, 70.0) == {"a": "root", "b": "a", "c": "b"}
    assert topology.parents(GROUP, 110.0) == {}
