"""Sources and destinations of images."""

from __future__ import annotations
