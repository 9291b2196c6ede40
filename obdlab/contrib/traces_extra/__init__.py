"""More to do with traces: ``obdlab trace transplant`` carries one over to a rebuilt image."""

from __future__ import annotations

from obdlab.cli.groups import Command

COMMAND = Command("transplant", "carry a trace over to a rebuilt image", f"{__name__}.transplanting:declare")
