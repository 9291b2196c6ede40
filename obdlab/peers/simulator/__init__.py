"""A flow-level simulator of hosts that pass blocks on, by the topologies of ``obdlab.peers.topology``.

It has a virtual clock, no I/O, and gives the same outcome for the same seed. Its numbers are simulated: nothing here
is measured, and ``fitting`` compares it with rows that are.
"""

from __future__ import annotations

from obdlab.peers.simulator.eventqueue import SimulationError
from obdlab.peers.simulator.site import Outcome, Site
from obdlab.peers.simulator.swarm import simulate
from obdlab.peers.simulator.workload import Step, Workload

__all__ = ["Outcome", "SimulationError", "Site", "Step", "Workload", "simulate"]
