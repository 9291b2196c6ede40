"""Sources of blobs: a local file, a registry, the shared block cache."""

from __future__ import annotations
