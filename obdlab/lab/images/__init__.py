"""The images of the datasets: recipes, builds, locks."""

from __future__ import annotations
