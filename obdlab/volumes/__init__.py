"""File systems of images, read and written in user space."""

from __future__ import annotations
