"""Conversion of OCI images to overlaybd images."""

from __future__ import annotations
