"""Hosts that pass blocks on to each other: the topologies, and the agent of a host."""

from __future__ import annotations
