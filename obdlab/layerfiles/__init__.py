"""Tools for layer files: describe, verify, compare, write, import."""

from __future__ import annotations
