"""Tests of the simulator of hosts that pass blocks on."""

from __future__ import annotations
