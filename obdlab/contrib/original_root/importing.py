"""Taking over a root of the original snapshotter: its metadata.db becomes our store; directories stay as they are.

The store appears whole or not at all. ``metadata.db`` is only read, and stays. The original can go back to the root
as long as we have not changed it. We keep a note of its transaction number, which shows whether the original has
changed the root since.
(containerd, snapshot storage schema v1; overlaybd snapshotter, on-disk layout.)
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.contrib.original_root.bolt import BoltFile, Bucket
from obdlab.errors import FormatError, ObdlabError
from obdlab.image.config import ConfigError, ImageConfig
from obdlab.snapshotter.layout import ORIGINAL_NAME, WRITABLE_NAME
from obdlab.snapshotter.store import Kind, Snapshot, Store, Usage
from obdlab.snapshotter.writable import LABEL_WRITABLE, Mode, WritableDevice
from obdlab.system import mount
from obdlab.system.locks import try_lock
from obdlab.system.newfile import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.snapshotter.layout import Layout

logger = logging.getLogger(__name__)

_NOTE_NAME = "metadata.db.imported"
_UNFINISHED = "metadata.sqlite.importing"
#: Seconds from the year 1, which Go counts from, to 1970.
_YEAR_ONE_S = 62_135_596_800
_MAX_ID = (1 << 63) - 1
_SYSFS = Path("/sys/block")


class ImportRootError(ObdlabError):
    """A root of the original snapshotter cannot be taken over as it is; the text names the remedy."""


def take_over(layout: Layout, default_mode: Mode) -> int | None:
    """Make a store from the original's if ours does not exist; return the number of its snapshots.

    Writable devices get the mode of their label, or ``default_mode``. Returns None if our store exists.
    Raises ImportRootError while the original or one of its mounts still uses the root, if it has changed the root
    since it was taken over, or if its metadata cannot be read.
    """
    original = layout.root / ORIGINAL_NAME
    with _locked(original):
        try:
            with BoltFile(original) as file:
                if layout.metadata.exists():
                    _check_unchanged(layout, file.transaction)
                    return None
                snapshots, last_id = read_snapshots(file)
                transaction = file.transaction
        except (FormatError, OSError) as error:
            raise ImportRootError(f"{original}: cannot be taken over ({error})") from error
        _check_mounts(layout, snapshots)
        configs = dict(_configs(layout, snapshots))
        _check_place(layout, configs)
        _note_devices(layout, snapshots, configs, default_mode)
        _tell_oddities(layout, snapshots, configs)
        # The note comes first: a store without it would be used even if the original changed the root later.
        _write_note(layout, transaction)
        _write_store(layout, snapshots, last_id)
    logger.warning("%s: took over %d snapshots of overlaybd-snapshotter", layout.root, len(snapshots))
    return len(snapshots)


def read_snapshots(file: BoltFile) -> tuple[list[Snapshot], int]:
    """Return the snapshots, parents first, and the last id in use. Raises FormatError."""
    bucket = file.root.bucket(b"v1").bucket(b"snapshots")
    found = {}
    for key, value in bucket.items():
        if not isinstance(value, Bucket):
            raise FormatError("snapshot that is no bucket", blob=file.name, got=key)
        snapshot = _snapshot(file.name, key, dict(value.items()))
        found[snapshot.key] = snapshot
    ids = {snapshot.id for snapshot in found.values()}
    if len(ids) != len(found):
        raise FormatError("two snapshots with one id", blob=file.name)
    return _parents_first(file.name, found), max(bucket.sequence, *ids, 0)


def _snapshot(name: str, key: bytes, values: dict[bytes, bytes | Bucket]) -> Snapshot:
    def value(field: bytes) -> bytes:
        found = values.get(field, b"")
        if isinstance(found, Bucket):
            raise FormatError(f"snapshot {key!r}: {field!r} is a bucket", blob=name)
        return found

    labels = values.get(b"labels")
    pairs = dict(labels.items()) if isinstance(labels, Bucket) else {}
    try:
        kind = Kind(_uvarint(value(b"kind")))
        snapshot_id = _uvarint(value(b"id"))
        if not (key and 0 < snapshot_id <= _MAX_ID):
            raise ValueError(f"id {snapshot_id}")
        return Snapshot(
            id=snapshot_id,
            key=key.decode(),
            parent=value(b"parent").decode(),
            kind=kind,
            labels={text.decode(): bytes(data).decode() for text, data in pairs.items() if isinstance(data, bytes)},
            created_ns=_time_ns(value(b"createdat")),
            updated_ns=_time_ns(value(b"updatedat")),
            usage=Usage(_varint(value(b"inodes")), _varint(value(b"size"))),
        )
    except (ValueError, OverflowError) as error:
        raise FormatError(f"damaged snapshot {key!r} ({error})", blob=name) from error


def _parents_first(name: str, found: dict[str, Snapshot]) -> list[Snapshot]:
    ordered: dict[str, Snapshot] = {}
    for snapshot in found.values():
        line = []
        at: Snapshot | None = snapshot
        while at is not None and at.key not in ordered:
            line.append(at)
            if len(line) > len(found):
                raise FormatError(f"snapshot {snapshot.key!r} is its own ancestor", blob=name)
            if at.parent and at.parent not in found:
                raise FormatError(f"snapshot {at.key!r} has no parent {at.parent!r}", blob=name)
            at = found[at.parent] if at.parent else None
        ordered |= {each.key: each for each in reversed(line)}
    return list(ordered.values())


# bbolt takes the same lock while it has the file open.
@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not try_lock(descriptor, shared=True):
            raise ImportRootError(f"{path.parent}: overlaybd-snapshotter still runs on this root: stop it")
        yield
    finally:
        os.close(descriptor)


def _check_unchanged(layout: Layout, transaction: int) -> None:
    note = layout.root / _NOTE_NAME
    if note.exists() and note.read_text().strip() != str(transaction):
        raise ImportRootError(
            f"{layout.root}: overlaybd-snapshotter has changed this root since it was taken over; which of both is "
            f"right? To go on with its metadata, remove {layout.metadata.name}*; with ours, remove {ORIGINAL_NAME}"
        )


# A device that the original's daemon still serves would be attached twice; both would write to a writable one.
def _check_mounts(layout: Layout, snapshots: Sequence[Snapshot]) -> None:
    points = {layout.mountpoint(snapshot.id) for snapshot in snapshots}
    used = sorted(str(entry.mountpoint) for entry in mount.mounts() if entry.mountpoint in points)
    for snapshot in snapshots:
        device = _marked_device(layout, snapshot.id)
        if device:
            used.append(device)
    if used:
        raise ImportRootError(
            f"{layout.root}: still in use by overlaybd-snapshotter's devices ({', '.join(used[:8])}): stop the "
            "containers, unmount and detach them (or reboot)"
        )


def _marked_device(layout: Layout, snapshot_id: int) -> str:
    try:
        device = layout.backstore_mark(snapshot_id).read_text().strip()
        vendor = (_SYSFS / os.path.basename(device) / "device" / "vendor").read_text()
    except (OSError, ValueError):
        return ""
    return device if vendor.strip() == "LIO-ORG" else ""


def _configs(layout: Layout, snapshots: Sequence[Snapshot]) -> Iterator[tuple[int, ImageConfig]]:
    for snapshot in snapshots:
        if not layout.directory(snapshot.id).is_dir():
            logger.warning("snapshot %r: its directory %s is gone", snapshot.key, layout.directory(snapshot.id))
        elif layout.is_image(snapshot.id):
            try:
                yield snapshot.id, ImageConfig.load(layout.config(snapshot.id))
            except ConfigError as error:
                logger.warning("snapshot %r: %s", snapshot.key, error)


def _check_place(layout: Layout, configs: dict[int, ImageConfig]) -> None:
    for snapshot_id, config in configs.items():
        for lower in config.lowers:
            ours = lower.dir.startswith(f"{layout.snapshots}/")
            if lower.dir and not ours and not os.path.isdir(lower.dir):
                raise ImportRootError(
                    f"{layout.config(snapshot_id)}: names {lower.dir}, which is not there: has the root been moved? "
                    "(wanted it where it was made)"
                )


def _note_devices(
    layout: Layout, snapshots: Sequence[Snapshot], configs: dict[int, ImageConfig], default_mode: Mode
) -> None:
    for snapshot in snapshots:
        config = configs.get(snapshot.id)
        if snapshot.kind is not Kind.ACTIVE or config is None or not config.upper.active:
            continue
        words = {mode.value: mode for mode in (Mode.DIR, Mode.DEV)}
        mode = words.get(snapshot.labels.get(LABEL_WRITABLE, ""), default_mode)
        device = WritableDevice(Mode.DIR if mode is Mode.OVERLAYFS else mode, config.upper)
        device.save(layout.block(snapshot.id) / WRITABLE_NAME)


def _tell_oddities(layout: Layout, snapshots: Sequence[Snapshot], configs: dict[int, ImageConfig]) -> None:
    for snapshot in snapshots:
        if (layout.directory(snapshot.id) / "zdfsmeta").exists():
            logger.warning("snapshot %r: is a legacy DADI layer; it is served if its blobs can be had", snapshot.key)


def _write_note(layout: Layout, transaction: int) -> None:
    note = layout.root / _NOTE_NAME
    try:
        replace_file(note, f"{transaction}\n".encode(), private=False, sync=True)
    except OSError as error:
        raise ImportRootError(f"{note}: cannot be written ({error.strerror})") from error


def _write_store(layout: Layout, snapshots: Sequence[Snapshot], last_id: int) -> None:
    unfinished = layout.root / _UNFINISHED
    for path in layout.root.glob(f"{_UNFINISHED}*"):
        path.unlink()
    store = Store(unfinished)
    try:
        with store.write() as writer:
            writer.restore(snapshots, last_id)
    finally:
        store.close()  # merges the write-ahead log into the one file, or leaves both and raises nothing
    if unfinished.with_name(f"{unfinished.name}-wal").exists():
        raise ImportRootError(f"{layout.metadata}: the metadata cannot be written whole (is the disk full?)")
    os.replace(unfinished, layout.metadata)
    descriptor = os.open(layout.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _uvarint(data: bytes) -> int:
    value = shift = 0
    for byte in data[:10]:
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        shift += 7
    raise ValueError(f"not a number: {data!r}")


def _varint(data: bytes) -> int:
    if not data:
        return 0
    value = _uvarint(data)
    return value >> 1 if not value & 1 else -((value + 1) >> 1)


# time.Time as Go's MarshalBinary writes it: version, seconds since the year 1, nanoseconds, zone.
def _time_ns(data: bytes) -> int:
    if len(data) not in (15, 16) or data[0] not in (1, 2):
        return 0
    seconds = int.from_bytes(data[1:9], "big", signed=True) - _YEAR_ONE_S
    return max(0, seconds * 10**9 + int.from_bytes(data[9:13], "big"))
