"""The topologies by name, each with the cost of joining it and the scope of its trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from obdlab.peers.simulator.eventqueue import SimulationError
from obdlab.peers.topology import BalancedTree, Direct, Group, RedirectTree, Rendezvous, RootedTree, Topology

#: Name of the host that reads from the origin in trees that have such a host, which starts no container.
ROOT = "root"
NAMES = ("direct", "rooted", "redirect", "balanced", "rendezvous")


@dataclass(frozen=True, slots=True)
class Rule:
    """A topology in a simulation.

    Attributes:
        topology: the rule that the agents follow as well.
        by_layer: a tree for each layer, not one for the image.
        join_trips: round trips until a host at a depth knows its parent.
    """

    topology: Topology
    by_layer: bool
    join_trips: Callable[[int], int]


def rule(name: str, hosts: int, layers: int, seed: int, arity: int = 2) -> Rule:
    """Return a topology for hosts named "0" to ``hosts`` - 1. Raises SimulationError for an unknown name."""
    if name == "direct":
        return Rule(Direct(), False, lambda depth: 0)
    if name == "rooted":
        return Rule(RootedTree(ROOT, arity), True, lambda depth: 1)
    if name == "redirect":
        return Rule(RedirectTree(ROOT, Random(seed), arity), True, lambda depth: max(0, depth - 1))
    if name == "balanced":
        if arity != 2:
            raise SimulationError(f"balanced: a binary tree (got arity {arity})")
        return Rule(BalancedTree(), False, lambda depth: 1)
    if name == "rendezvous":
        # Each host knows the list of all, and computes the tree alone.
        computed = Rendezvous(arity)
        for layer in range(layers):
            computed.admit(group(layer), map(str, range(hosts)))
        return Rule(computed, True, lambda depth: 0)
    raise SimulationError(f"topology: unknown (got {name!r}, wanted one of {', '.join(NAMES)})")


def group(layer: int) -> Group:
    """Return the group of the hosts that read a layer."""
    return Group(f"layer-{layer}")
