"""Starts that are recorded or watched: a container for one run, and its directory."""

from __future__ import annotations
