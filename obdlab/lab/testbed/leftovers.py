"""Removing the remains of killed experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.lab.testbed import netns, takedown
from obdlab.lab.testbed.ownership import DEFAULT_STATE_DIR

if TYPE_CHECKING:
    from pathlib import Path


def cleanup_leftovers(state_dir: Path = DEFAULT_STATE_DIR) -> list[str]:
    """Remove containerds, containers, mounts, namespaces and processes whose experiment is gone; return their names.

    Experiments that still run are left alone. Raises ObdlabError if something cannot be removed.
    """
    return [*takedown.remove_orphans(state_dir), *netns.remove_orphans(state_dir)]
