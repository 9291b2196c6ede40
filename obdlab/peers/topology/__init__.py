"""From which host a host gets its blocks: pure rules without I/O or clock, for an agent and a simulator alike."""

from __future__ import annotations

from obdlab.peers.topology.balanced import BalancedTree
from obdlab.peers.topology.interface import Direct, Group, Topology
from obdlab.peers.topology.redirect import RedirectTree
from obdlab.peers.topology.rendezvous import Rendezvous
from obdlab.peers.topology.rooted import RootedTree

__all__ = ["BalancedTree", "Direct", "Group", "RedirectTree", "Rendezvous", "RootedTree", "Topology"]
