"""The LSMT layer format: sectors of a virtual disk as an ordered index over packed data."""

from __future__ import annotations
