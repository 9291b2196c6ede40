"""A blob as an NBD export, for virtual machines and tools that need no kernel device (NBD protocol)."""

from __future__ import annotations

from obdlab.cli.groups import Command

COMMAND = Command("nbd", "serve an image over NBD, as to qemu", f"{__name__}.serving:declare")
