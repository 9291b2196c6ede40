"""The obdlab command: one file per subcommand, argv to one call."""

from __future__ import annotations
