"""A virtual machine with a distribution's kernel, for tests that need more kernel than the host has (README.md)."""

from __future__ import annotations
