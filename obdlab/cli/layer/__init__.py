"""Commands about layer files."""

from __future__ import annotations
