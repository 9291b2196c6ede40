"""Parts that packages register by entry points, found at first need.

The group names the contract: ``obdlab.devices``, ``obdlab.commands``, ``obdlab.schedulers`` ... An editable
installation and a wheel both register the entry points of ``pyproject.toml``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import EntryPoint


class PluginError(ObdlabError):
    """A registered part cannot be imported."""


def names(group: str) -> tuple[str, ...]:
    """Return the names registered in ``group``, sorted. Imports none of the parts."""
    return tuple(sorted(_entries(group)))


def load(group: str, name: str) -> Any:
    """Import a registered part and return it, or None if no part has that name. Raises PluginError."""
    entry = _entries(group).get(name)
    if entry is None:
        return None
    try:
        return entry.load()
    except Exception as error:  # any error of another package
        raise PluginError(f"{group}: {name}: cannot be imported ({entry.value}): {error}") from error


# Imported late: the import and the search of 170 packages take 12 ms of processor time each.
@cache
def _entries(group: str) -> Mapping[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=group)}
