"""An image as its config.v1.json describes it, opened as one blob."""

from __future__ import annotations
