"""Formats as blobs: tar window, ZFile, LSMT layer, stack, writable upper."""

from __future__ import annotations
