"""The NBD export: a client of our own for what no well-behaved one would send, and qemu."""

from __future__ import annotations
