"""Experiments: images, networks, hosts, cold proof, rows, statistics, figures."""

from __future__ import annotations
