"""Layers and traces added to converted images."""

from __future__ import annotations
