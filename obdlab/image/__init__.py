"""Opening an image, described by its config.v1.json, as one blob."""

from __future__ import annotations
