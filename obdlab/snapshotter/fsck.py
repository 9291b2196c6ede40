"""Checking and repairing a snapshotter's root: metadata, directories, configurations and devices must agree.

Anything that can be derived is made again: the configuration of a remote layer follows from its labels. Directories
without a row are deleted. A lost snapshot is forgotten together with all snapshots on it, so that clients get
"not found" instead of half of its files.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from obdlab.command import command
from obdlab.errors import ObdlabError
from obdlab.formats.oci import chain_id_over, is_digest
from obdlab.formats.turbofiles import TARGET_FILE
from obdlab.image.config import COMMIT_FILE, SEALED_FILE, ConfigError, ImageConfig
from obdlab.snapshotter import overlaybd, turbo
from obdlab.snapshotter.errors import FailedPreconditionError
from obdlab.snapshotter.layout import CONFIG_NAME, ORIGINAL_NAME, Layout, RootError
from obdlab.snapshotter.store import Kind, Store
from obdlab.snapshotter.trees import delete_tree
from obdlab.snapshotter.writable import WritableDevice, is_only_copy
from obdlab.system import mount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obdlab.image.config import LowerConfig
    from obdlab.server.client import DeviceService
    from obdlab.snapshotter.overlaybd import ImageOptions
    from obdlab.snapshotter.store import Snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """A defect: ``what`` describes it, ``remedy`` is text (empty if there is no remedy), ``mend`` applies it."""

    what: str
    remedy: str = ""
    mend: Callable[[], None] | None = None


class RootCheck:
    """A root without a running snapshotter; for looking only, also one that is in use."""

    def __init__(
        self, root: Path, options: ImageOptions, devices: DeviceService | None = None, *, lock: bool = True
    ) -> None:
        """Open the root. Raises RootError if it is not a root or a snapshotter has it ``lock``ed, and StoreError."""
        metadata = root / "metadata.sqlite"
        if not metadata.exists():
            note = f"; {ORIGINAL_NAME} is there: `{command('serve', 'snapshotter')}` takes it over at its first start"
            raise RootError(f"{root}: no root of a snapshotter{note if (root / ORIGINAL_NAME).exists() else ''}")
        self._layout = Layout(root, lock=lock)
        self._options = options
        self._devices = devices
        try:
            self._store = Store(metadata)
        except BaseException:
            self._layout.close()
            raise
        with self._store.read() as reader:
            self._snapshots = reader.all()
        self._by_key = {snapshot.key: snapshot for snapshot in self._snapshots}
        self._lost: set[str] = set()

    def close(self) -> None:
        """Close the store and unlock the root."""
        self._store.close()
        self._layout.close()

    def findings(self) -> Iterator[Finding]:
        """Yield the defects. Mend each before asking for the next: later checks rely on earlier repairs."""
        yield from self._metadata()
        for snapshot in self._parents_first():
            if snapshot.parent in self._lost:
                self._lost.add(snapshot.key)
                continue
            yield from self._snapshot(snapshot)
        yield from self._leftovers()
        yield from self._strays()

    # -- the store -----------------------------------------------------------------------------------------------

    def _metadata(self) -> Iterator[Finding]:
        path = self._layout.metadata
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                rows = [row[0] for row in connection.execute("PRAGMA integrity_check(10)")]
                orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
        except sqlite3.Error as error:
            yield Finding(f"{path}: cannot be checked ({error})")
            return
        for text in rows:
            if text != "ok":
                yield Finding(f"{path}: damaged ({text})")
        if orphans:
            yield Finding(f"{path}: {len(orphans)} snapshots whose parent is not there")

    def _parents_first(self) -> list[Snapshot]:
        return sorted(self._snapshots, key=self._depth)

    def _depth(self, snapshot: Snapshot) -> int:
        depth, at = 0, snapshot
        while at.parent in self._by_key and depth <= len(self._snapshots):
            depth, at = depth + 1, self._by_key[at.parent]
        return depth

    # -- one snapshot --------------------------------------------------------------------------------------------

    def _snapshot(self, snapshot: Snapshot) -> Iterator[Finding]:
        name = f"snapshot {snapshot.id} ({snapshot.key!r})"
        home = self._layout.directory(snapshot.id)
        remote = self._remote(snapshot)
        if remote is not None and self._is_wrong(snapshot, remote):
            self._lost.add(snapshot.key)
            yield Finding(
                f"{name}: layer {remote.digest} is not the one of this name: another image's files would show",
                "forget it and what builds on it",
                partial(self._forget, snapshot),
            )
            return
        for part in (home, home / "fs"):
            if part.is_dir():
                continue
            if remote is None:
                self._lost.add(snapshot.key)
                yield Finding(
                    f"{name}: {part} is gone",
                    "forget it and what builds on it",
                    partial(self._forget, snapshot),
                )
                return
            yield Finding(f"{name}: {part} is gone", "make it", partial(self._make_directory, part, 0o755))
        if snapshot.kind is Kind.ACTIVE and not (home / "work").is_dir():
            yield Finding(
                f"{name}: {home / 'work'} is gone", "make it", partial(self._make_directory, home / "work", 0o711)
            )
        yield from self._image(snapshot, name, remote)
        yield from self._own_device(snapshot, name)

    def _image(self, snapshot: Snapshot, name: str, remote: overlaybd.RemoteLayer | None) -> Iterator[Finding]:
        path = self._layout.config(snapshot.id)
        if not path.exists():
            if remote is not None:
                rebuild = partial(self._rebuild, snapshot, remote)
                yield Finding(f"{name}: {path} is gone", "make it from the labels", rebuild)
            return
        try:
            config = ImageConfig.load(path)
        except ConfigError as error:
            if remote is not None:
                yield Finding(f"{name}: {error}", "make it from the labels", partial(self._rebuild, snapshot, remote))
            else:
                yield Finding(f"{name}: {error}")
            return
        point = self._layout.mountpoint(snapshot.id)
        if not point.is_dir():
            yield Finding(f"{name}: {point} is gone", "make it", partial(self._make_directory, point, 0o711))
        places = [str(self._layout.fs(each)) for each in self._images_of(snapshot)]
        got = [lower.dir for lower in config.lowers]
        if got != places:
            text = f"{name}: its configuration names other layers (got {got}, wanted {places})"
            if remote is not None:
                yield Finding(text, "make it from the labels", partial(self._rebuild, snapshot, remote))
            else:
                yield Finding(text)
        yield from self._blob(snapshot, name, remote)

    # Returns the ids of the layers of its device, bottom first.
    def _images_of(self, snapshot: Snapshot) -> list[int]:
        ids = [] if self._layout.has_device(snapshot.id) else [snapshot.id]
        at = self._by_key.get(snapshot.parent)
        while at is not None:
            ids.append(at.id)
            at = self._by_key.get(at.parent)
        return ids[::-1]

    def _blob(self, snapshot: Snapshot, name: str, remote: overlaybd.RemoteLayer | None) -> Iterator[Finding]:
        if turbo.is_turbo(snapshot.labels):
            yield from self._turbo(snapshot, name)
            return
        fs = self._layout.fs(snapshot.id)
        there = [file for file in (fs / COMMIT_FILE, fs / SEALED_FILE) if file.is_file()]
        for file in there:
            trouble = _trouble_of(file)
            if trouble and remote is not None:
                yield Finding(f"{name}: {trouble}", "delete it: the registry has it", file.unlink)
            elif trouble:
                yield Finding(f"{name}: {trouble}")
        if not there and remote is None and not self._layout.has_device(snapshot.id):
            self._lost.add(snapshot.key)
            yield Finding(
                f"{name}: its layer is neither in {fs} nor in a registry",
                "forget it and what builds on it",
                partial(self._forget, snapshot),
            )

    # Earlier versions took the target from a label, which any image with the same blob could set.
    def _turbo(self, snapshot: Snapshot, name: str) -> Iterator[Finding]:
        fs = self._layout.fs(snapshot.id)
        forget = "forget it and what builds on it", partial(self._forget, snapshot)
        lower = ImageConfig.load(self._layout.config(snapshot.id)).lowers[-1]
        gone = [file for file in (lower.file, lower.gzip_index, lower.tar_sums) if file and not os.path.isfile(file)]
        if gone:
            self._lost.add(snapshot.key)
            yield Finding(f"{name}: {gone[0]} is gone", *forget)
            return
        try:
            turbo.named_size(fs, turbo.turbo_layer(snapshot.labels), self._options)
        except ObdlabError as error:
            if not os.path.lexists(fs / TARGET_FILE):
                yield Finding(f"{name}: {error}")
                return
            self._lost.add(snapshot.key)
            yield Finding(f"{name}: {error}", *forget)
            return
        trouble = _trouble_of_target(lower) if lower.target_file else ""
        if trouble:
            yield Finding(
                f"{name}: the layer with its files, in containerd's content store, cannot be read: {trouble}; "
                "remove the image with its containers, and pull or make it again"
            )

    def _own_device(self, snapshot: Snapshot, name: str) -> Iterator[Finding]:
        try:
            device = WritableDevice.load(self._layout.writable(snapshot.id))
        except FailedPreconditionError as error:
            yield Finding(f"{name}: {error}")
            return
        if device is None or snapshot.kind is Kind.COMMITTED:
            return
        sealed = self._layout.fs(snapshot.id) / SEALED_FILE
        if is_only_copy(sealed, device.upper):
            self._lost.add(snapshot.key)
            yield Finding(f"{name}: {sealed} is the only copy of what it wrote, and stays")
            return
        for path in (device.upper.data, device.upper.index):
            if not os.path.isfile(path):
                self._lost.add(snapshot.key)
                yield Finding(f"{name}: what it wrote is gone ({path})", "forget it", partial(self._forget, snapshot))
                return

    def _remote(self, snapshot: Snapshot) -> overlaybd.RemoteLayer | None:
        # Earlier versions let an annotation give a plain layer the label of a remote one. Its name never fits.
        if overlaybd.LABEL_REMOTE not in snapshot.labels or snapshot.key != overlaybd.pull_target(snapshot.labels):
            return None
        try:
            return overlaybd.remote_layer(snapshot.labels, self._options)
        except ObdlabError:
            return None

    # True if the name is a chain ID, the parent's chain ID is known, and they differ. Earlier versions did not check.
    def _is_wrong(self, snapshot: Snapshot, layer: overlaybd.RemoteLayer) -> bool:
        below = self._by_key.get(snapshot.parent)
        chain = overlaybd.pull_target(below.labels) if below is not None else ""
        known = is_digest(snapshot.key) and (below is None or is_digest(chain))
        return known and snapshot.key != chain_id_over(chain, layer.digest)

    # -- leftovers -----------------------------------------------------------------------------------------------

    def _leftovers(self) -> Iterator[Finding]:
        for path in self._layout.unknown({snapshot.id for snapshot in self._snapshots}):
            yield Finding(f"{path}: belongs to no snapshot", "delete it", partial(_delete, path))

    def _strays(self) -> Iterator[Finding]:
        known = {self._layout.config(snapshot.id) for snapshot in self._snapshots}
        for device in self._devices.list() if self._devices is not None else ():
            if self._layout.snapshots in device.config.parents and device.config not in known:
                text = f"device {device.device_id} ({device.path}): belongs to no snapshot"
                yield Finding(text, "detach it", partial(self._release, device.device_id))

    # -- mending -------------------------------------------------------------------------------------------------

    @staticmethod
    def _make_directory(path: Path, mode: int) -> None:
        path.mkdir(parents=True)
        path.chmod(mode)

    def _rebuild(self, snapshot: Snapshot, layer: overlaybd.RemoteLayer) -> None:
        parent = self._by_key.get(snapshot.parent)
        below = ImageConfig.load(self._layout.config(parent.id)) if parent is not None else None
        home = self._layout.directory(snapshot.id)
        config = overlaybd.remote_config(below, layer, home, self._options)
        for path in (home / "block", home / "block" / "mountpoint"):
            if not path.is_dir():
                self._make_directory(path, 0o711)
        config.save(home / "block" / CONFIG_NAME)

    def _forget(self, snapshot: Snapshot) -> None:
        doomed = [snapshot.key]
        for each in self._parents_first():
            if each.parent in doomed:
                doomed.append(each.key)
        with self._store.write() as writer:
            for key in reversed(doomed):
                writer.remove(key)
        for key in doomed:
            _delete(self._layout.directory(self._by_key[key].id))
        self._snapshots = [each for each in self._snapshots if each.key not in doomed]

    def _release(self, device_id: str) -> None:
        assert self._devices is not None
        self._devices.detach(device_id)


# Unmounts first: deleting must not reach into an image.
def _delete(path: Path) -> None:
    for entry in reversed(mount.mounts()):
        if path in entry.mountpoint.parents:
            mount.unmount(entry.mountpoint)
    if path.is_dir() and not path.is_symlink():
        delete_tree(path)
    else:
        path.unlink(missing_ok=True)


# What opening finds: a file that is gone, cut, or not of the layer's index. Its digest is not looked at.
def _trouble_of_target(lower: LowerConfig) -> str:
    from obdlab.blob import unwrapped
    from obdlab.image.target import open_target
    from obdlab.layers.spancache import SpanCache

    try:
        open_target(lower, None, unwrapped, SpanCache())[0].close()
    except ObdlabError as error:
        return str(error)
    return ""


def _trouble_of(file: Path) -> str:
    from obdlab.image.open import open_stack

    try:
        open_stack([file]).close()
    except ObdlabError as error:
        return str(error)
    return ""
