"""Experiments: declaration, run, rows, statistics."""

from __future__ import annotations
