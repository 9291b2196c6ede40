"""Listings of trees, to compare images."""

from __future__ import annotations
