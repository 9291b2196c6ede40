"""Hosts that pass blocks on to each other. So far the topologies alone; no agent uses them yet."""

from __future__ import annotations
