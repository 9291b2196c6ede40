"""Live snapshots: a writable image continues in a fresh layer, and its configuration names that from then on."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import ObdlabError
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig, read_config
from obdlab.image.open import stacked_lowers
from obdlab.layers.append import AppendUpper
from obdlab.layers.layerfile import sync_directory
from obdlab.layers.upper import SparseUpper, open_upper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.layers.stack import WritableStack


class SnapshotError(ObdlabError, code="snapshot"):
    """A snapshot cannot be taken; nothing has changed."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The result of a snapshot: the sealed layer, and how long writes had to wait."""

    sealed: str
    paused_s: float


def snapshot(image: WritableStack, config_path: Path, new_config_path: Path) -> Snapshot:
    """Seal the image's writable layer and continue in the one that the file ``new_config_path`` names.

    That configuration must have the lowers of the present one, ``config_path``, with the writable layer's data file
    above them, and another, empty upper. It replaces the present one at the moment when the layers change: opening
    ``config_path`` after a crash at any point gives all flushed data. Reads continue meanwhile, writes wait some
    milliseconds.

    Raises SnapshotError, ConfigError, or SourceError and FormatError of the layers; then the image stays as it was.
    """
    with image.snapshotting, ExitStack() as ending:
        config_path = config_path.resolve()
        new = ImageConfig.load(new_config_path)
        _check(image, ImageConfig.load(config_path), new, f"{config_path}", f"{new_config_path}")
        switch = ending.enter_context(_switched(config_path, new_config_path))
        upper = open_upper(new.upper.data, new.upper.index)
        ending.callback(lambda: None if image.upper is upper else upper.close())
        done = image.restack(upper, switch)
    with suppress(OSError):  # its content is in place
        new_config_path.unlink()
    return Snapshot(sealed=done.layer.name, paused_s=done.paused_s)


def make_next(config_path: Path, data: Path, index: Path | None) -> ImageConfig:
    """Make an empty layer for a snapshot to continue in, in append mode if there is an ``index``, else sparse.

    Returns the configuration that :func:`snapshot` needs. A sparse layer gets an empty index file, ``<data>.index``,
    since configurations must name one. Raises SnapshotError if the image has no writable layer, SourceError if a file
    exists already.
    """
    config = ImageConfig.load(config_path)
    if not config.upper.active:
        raise SnapshotError(f"{config_path}: the image has no writable layer")
    data = data.absolute()
    if index is None:
        index = data.with_name(f"{data.name}.index")
        SparseUpper.create(data, 0, index_path=index).close()
    else:
        AppendUpper.create(data, index, 0).close()
    sealed = LowerConfig(file=config.upper.data)
    upper = UpperConfig(index=str(index.absolute()), data=str(data), vsize_gb=config.upper.vsize_gb)
    return replace(config, lowers=(*config.lowers, sealed), upper=upper)


def _check(image: WritableStack, old: ImageConfig, new: ImageConfig, old_name: str, new_name: str) -> None:
    if not old.upper.active or not _same_file(old.upper.data, image.upper.data.name):
        raise SnapshotError(f"{old_name}: names another writable layer than the one in use ({image.upper.data.name})")
    if not new.upper.active:
        raise SnapshotError(f"{new_name}: names no writable layer to go on in")
    for path in (new.upper.data, new.upper.index):
        if any(_same_file(path, used) for used in (old.upper.data, old.upper.index)):
            raise SnapshotError(f"{new_name}: its writable layer's file {path} is in use by the present one")
    have, wanted = stacked_lowers(new), [*stacked_lowers(old), LowerConfig(file=old.upper.data)]
    if len(have) != len(wanted):
        raise SnapshotError(
            f"{new_name}: wrong number of lowers (got {len(have)}, wanted those of {old_name} "
            f"and {old.upper.data}: {len(wanted)})"
        )
    for number, (got, known) in enumerate(zip(have, wanted, strict=True)):
        if not _same_layer(got, known):
            raise SnapshotError(f"{new_name}: lower {number} differs (got {_place(got)}, wanted {_place(known)})")
    if old.repo_blob_url and not new.repo_blob_url:
        raise SnapshotError(f"{new_name}: no repoBlobUrl (wanted {old.repo_blob_url})")


def _same_layer(one: LowerConfig, other: LowerConfig) -> bool:
    if one.digest and one.digest == other.digest:
        return True
    files = one.local_file(), other.local_file()
    return files[0] is not None and files[1] is not None and _same_file(files[0], files[1])


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _place(lower: LowerConfig) -> str:
    return lower.digest or lower.file or lower.dir or "nothing"


@contextmanager
def _switched(config_path: Path, new_config_path: Path) -> Iterator[Callable[[], None]]:
    # Yields the function that replaces the old file by the new one. The new file is copied beforehand, since writes
    # wait for the function, and into the same directory, since it may lie in another file system.
    folder = config_path.parent
    before, after = folder / f".{config_path.name}.before", folder / f".{config_path.name}.after"

    def switch() -> None:
        os.replace(after, config_path)
        try:
            sync_directory(str(config_path))
        except BaseException:
            os.replace(before, config_path)
            raise

    try:
        try:
            _copy(config_path, before, config_path.stat())
            _copy(new_config_path, after, config_path.stat())
        except OSError as error:
            raise SnapshotError(f"{config_path}: cannot be replaced: {error.strerror}") from error
        yield switch
    finally:
        for path in (before, after):
            path.unlink(missing_ok=True)


def _copy(source: Path, target: Path, like: os.stat_result) -> None:
    target.unlink(missing_ok=True)  # left by a snapshot that was killed
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(read_config(source))
        file.flush()
        os.fchown(descriptor, like.st_uid, like.st_gid)
        os.fchmod(descriptor, like.st_mode & 0o7777)
        os.fsync(descriptor)
