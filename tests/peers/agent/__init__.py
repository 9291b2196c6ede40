"""Tests of the agent that passes blocks on."""

from __future__ import annotations
