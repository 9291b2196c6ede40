"""The trees to which layers are applied."""

from __future__ import annotations
