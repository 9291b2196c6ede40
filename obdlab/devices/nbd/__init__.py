"""A blob as an NBD export, for virtual machines and tools that need no kernel device (NBD protocol)."""

from __future__ import annotations
