"""Figures, reports and notebooks."""

from __future__ import annotations
