"""Conversion of many images."""

from __future__ import annotations
