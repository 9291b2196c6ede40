"""A Blob as a kernel block device. Knows nothing of images."""

from __future__ import annotations
