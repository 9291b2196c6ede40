"""Fetching into the block cache ahead of the readers."""

from __future__ import annotations
