"""Counters and health over HTTP."""

from __future__ import annotations
