"""Builds images by a Dockerfile, on lazily read bases."""

from __future__ import annotations
