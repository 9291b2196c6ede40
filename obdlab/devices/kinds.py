"""The registry of block device kinds: those of the core, and those that packages register as ``obdlab.devices``."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from obdlab import plugins
from obdlab.devices import loop
from obdlab.devices.kind import Kind
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

GROUP = "obdlab.devices"
AUTOMATIC = "auto"
#: The kind of devices whose record names none: records of the first versions.
FIRST = "fuse+loop"
TCMU = "tcmu"
_CORE = {FIRST: "obdlab.devices.fuse_loop", TCMU: "obdlab.devices.tcmu.tcmu_kind"}


def names() -> list[str]:
    """Return the names of all kinds, with the core's first. Imports none of them."""
    return [*_CORE, *(name for name in plugins.names(GROUP) if name not in _CORE)]


@cache
def _kind(name: str) -> Kind | None:
    if name in _CORE:
        kind = import_module(_CORE[name]).KIND
    else:
        kind = plugins.load(GROUP, name)
    assert kind is None or isinstance(kind, Kind), f"{GROUP}: {name}: not a Kind"
    return kind


def every() -> list[Kind]:
    """Return all kinds. Logs kinds that cannot be imported, and leaves them out."""
    found = []
    for name in names():
        try:
            kind = _kind(name)
        except plugins.PluginError as error:
            log.warning("%s", error)
        else:
            assert kind is not None
            found.append(kind)
    return found


def find(name: str) -> Kind:
    """Return the kind of that name, or the best that this host has for ``auto``. Raises DeviceError."""
    if name == AUTOMATIC:
        return best()
    try:
        kind = _kind(name)
    except plugins.PluginError as error:
        raise DeviceError(str(error)) from error
    if kind is None:
        wanted = ", ".join(names())
        raise DeviceError(f"no such kind of device (got {name!r}, wanted {AUTOMATIC} or one of {wanted})")
    return kind


def check(kind: Kind) -> None:
    """Raise DeviceError, saying what to do, if this host has no such devices."""
    trouble = kind.missing()
    if trouble:
        raise DeviceError(f"this host has no {kind.name} devices: {trouble} (try: {kind.fix})")


def best() -> Kind:
    """Return the best kind that this host has: first one whose devices outlive their servers, then the most tested.

    On Linux 6.9 and later that is FUSE and loop, where several processes serve a busy device as well. On older
    kernels: the kind with the highest ``preference``, then FUSE and loop, whose devices end with their servers there.
    """
    first = find(FIRST)
    if not first.missing() and first.can_change_servers():
        return first
    others = [kind for kind in every() if kind.preference and not kind.missing()]
    return max(others, key=lambda kind: kind.preference, default=first)


def devices_of(directory: Path) -> list[Path]:
    """Return the nodes of the device at ``directory``, of any kind."""
    return [path for kind in every() for path in kind.devices_of(directory)]


def take_down(directory: Path, *, timeout_s: float = 10.0, force: bool = False) -> None:
    """Remove the device at ``directory``, of any kind, from the kernel: see :meth:`Kind.take_down`."""
    for kind in every():
        kind.take_down(directory, timeout_s=timeout_s, force=force)


def is_unused(directory: Path) -> bool:
    """Return True if the device has no exclusive user, such as a file system of any mount namespace."""
    return not any(loop.in_use(path) for path in devices_of(directory))


def directories_below(parent: Path) -> set[Path]:
    """Return the directories below ``parent`` that have devices, including deleted directories."""
    return {directory for kind in every() for directory in kind.directories_below(parent)}
