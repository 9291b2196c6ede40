"""Lazy pulls: containerd's stores filled with metadata only."""

from __future__ import annotations
