"""Traces carried over to rebuilt images: ``obdlab trace transplant``."""

from __future__ import annotations

from obdlab.cli.groups import Command

COMMAND = Command("transplant", "carry a trace over to a rebuilt image", f"{__name__}.command:declare")
