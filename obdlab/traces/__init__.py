"""Traces of starts: recorded, shown, combined, replayed, and stored as hot layers."""

from __future__ import annotations
