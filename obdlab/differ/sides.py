"""The snapshots that a caller's mounts show: containerd gives a differ neither names nor the snapshotter.

Mounts are text from the caller. Only a path that this snapshotter hands out itself is taken for one of its snapshots.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from obdlab.snapshotter.errors import NotFoundError
from obdlab.snapshotter.mounts import Mount
from obdlab.snapshotter.store import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from obdlab.containerd._pb import types_pb2
    from obdlab.server.client import Devices
    from obdlab.snapshotter.snapshots import Snapshots

_FS, _MOUNTPOINT = "fs", "block/mountpoint"
_UPPER = "upperdir="
#: More mounts, options or bytes than any snapshot has.
_MOST_MOUNTS, _MOST_OPTIONS, _MOST_TEXT = 4, 64, 1 << 16


def mounts_of(messages: Iterable[types_pb2.Mount]) -> tuple[Mount, ...]:
    """Return the caller's mounts."""
    return tuple(Mount(each.type, each.source, tuple(each.options)) for each in messages)


class Sides:
    """Finds the snapshots of one root by their mounts."""

    def __init__(self, snapshots: Snapshots, devices: Devices) -> None:
        self._snapshots = snapshots
        self._devices = devices
        prefix = re.escape(str(snapshots.layout.snapshots))
        self._path = re.compile(rf"{prefix}/([1-9][0-9]{{0,18}})/({_FS}|{_MOUNTPOINT})", re.ASCII)

    def directory(self, mounts: Sequence[Mount]) -> int | None:
        """Return the id of the active snapshot whose ``fs`` takes what is written to the mounts; None for others."""
        mount = _only(mounts)
        if mount is None:
            return None
        if mount.type == "overlay":
            uppers = [option.removeprefix(_UPPER) for option in mount.options if option.startswith(_UPPER)]
            found = self._named(uppers[0]) if len(uppers) == 1 else None
        elif mount.type == "bind" and "ro" not in mount.options:
            found = self._named(mount.source)
        else:
            return None
        return found[0] if found is not None and found[1] == _FS else None

    def device(self, mounts: Sequence[Mount]) -> int | None:
        """Return the id of the snapshot whose device the mounts show: an image's or a container's; else None."""
        mount = _only(mounts)
        if mount is None:
            return None
        if mount.type == "bind":
            found = self._named(mount.source)
            return found[0] if found is not None and found[1] == _MOUNTPOINT else None
        return self._handed_over(mount.source)

    def is_parent(self, mounts: Sequence[Mount], parent_id: int | None) -> bool:
        """Return True if the mounts show the image of the snapshot ``parent_id``, or for None an empty directory."""
        if parent_id is not None:
            return self.device(mounts) == parent_id
        mount = _only(mounts)
        if mount is None:
            return not mounts
        found = self._named(mount.source) if mount.type == "bind" else None
        if found is None or found[1] != _FS:
            return False
        try:
            with self._snapshots.store.read() as reader:
                row = reader.by_id(found[0])
        except NotFoundError:
            return False
        return row.kind is Kind.VIEW and not row.parent

    def is_device_of(self, path: Path, snapshot_id: int) -> bool:
        """Return True if the device at ``path`` is the snapshot's."""
        config = self._snapshots.layout.config(snapshot_id)
        return any(device.path == path and device.config == config for device in self._devices.list())

    def _named(self, path: str) -> tuple[int, str] | None:
        match = self._path.fullmatch(path)
        return (int(match[1]), match[2]) if match else None

    # In mode ``dev`` the caller has the device node alone.
    def _handed_over(self, source: str) -> int | None:
        configs = {device.config for device in self._devices.list() if str(device.path) == source}
        layout = self._snapshots.layout
        with self._snapshots.store.read() as reader:
            rows = reader.all() if configs else []
        return next((row.id for row in rows if layout.has_device(row.id) and layout.config(row.id) in configs), None)


def _only(mounts: Sequence[Mount]) -> Mount | None:
    if len(mounts) != 1 or len(mounts[0].options) > _MOST_OPTIONS:
        return None
    mount = mounts[0]
    return mount if len(mount.source) + sum(map(len, mount.options)) <= _MOST_TEXT else None
