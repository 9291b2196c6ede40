"""The block cache on local disk, and everything that fills and empties it."""

from __future__ import annotations
