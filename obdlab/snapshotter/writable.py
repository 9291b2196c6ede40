"""Containers that write to their own block device instead of an overlay: the writable layer and its commit.

The files have the original's names and lie in the snapshot's ``block`` directory, or in the directory that a label
names. A commit seals the layer in place and gives it a second name, ``fs/overlaybd.sealed``. A mark beside it makes
the next opening undo the seal, in case the commit is interrupted.

(overlaybd snapshotter, writable modes and commit; overlaybd LSMT layout, sealing.)
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Self

from obdlab.errors import ObdlabError
from obdlab.formats.decimal import decimal
from obdlab.image.config import UpperConfig
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.hostpaths import allowed_path
from obdlab.system.newfile import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LABEL_WRITABLE = "containerd.io/snapshot/overlaybd.writable"
LABEL_ACTIVE_PATH = "containerd.io/snapshot/overlay.active.path"
LABEL_VSIZE = "containerd.io/snapshot/overlaybd/vsize"
LABEL_COMMIT_PATH = "containerd.io/snapshot/overlaybd.localcommitpath"
LABEL_TYPE = "containerd.io/snapshot/type"

_DATA, _INDEX = "writable_data", "writable_index"
_DEFAULT_SIZE_GB = 64
_MAX_SIZE_GB = 1 << 14
_GB = 1 << 30


class Mode(Enum):
    """The kind of a container's writable part."""

    #: An overlay over the image's device, which all its containers share.
    OVERLAYFS = "overlayfs"
    #: Its own writable device, mounted by the snapshotter.
    DIR = "dir"
    #: Its own writable device, which the client mounts.
    DEV = "dev"


def mode_asked(labels: Mapping[str, str], default: Mode) -> Mode:
    """Return the mode in a new snapshot's labels; any other word than ``dir`` and ``dev`` means an overlay."""
    text = labels.get(LABEL_WRITABLE)
    if text is None:
        return default
    return Mode(text) if text in (Mode.DIR.value, Mode.DEV.value) else Mode.OVERLAYFS


@dataclass(frozen=True, slots=True)
class WritableDevice:
    """A snapshot's own device: its mode and the place of its layer. Kept as a file in ``block``."""

    mode: Mode
    upper: UpperConfig

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read the file; None if it is missing. Raises FailedPreconditionError if it is damaged."""
        try:
            values = json.loads(path.read_bytes())
            upper = UpperConfig(str(values["index"]), str(values["data"]), int(values["vsize"]))
            return cls(Mode(values["mode"]), upper)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FailedPreconditionError(f"{path}: damaged ({error!r})") from error

    def save(self, path: Path) -> None:
        """Write the file and sync it: after a power cut the snapshot's row is there, so the file must be too."""
        upper = self.upper
        values = {"mode": self.mode.value, "data": upper.data, "index": upper.index, "vsize": upper.vsize_gb}
        replace_file(path, json.dumps(values).encode(), sync=True)


def upper_for(labels: Mapping[str, str], block: Path, size_gb: int, roots: Sequence[Path]) -> UpperConfig:
    """Return the place of a new snapshot's layer and the size of its disk; size 0 means that of the layers below.

    A label may place it outside of ``block``, below one of ``roots``. Raises InvalidArgumentError for other places.
    """
    place = labels.get(LABEL_ACTIVE_PATH, "")
    directory = allowed_path(place, roots, LABEL_ACTIVE_PATH, "activePathRoots") if place else block
    return UpperConfig(str(directory / _INDEX), str(directory / _DATA), size_gb)


def size_gb(labels: Mapping[str, str]) -> int:
    """Return the size of a new disk without lower layers, in GB.

    As in the original, a malformed number means the default. Raises InvalidArgumentError for one that is too large.
    """
    text = labels.get(LABEL_VSIZE, "")
    size = decimal(text, 10**9 - 1)
    if not size:
        return _DEFAULT_SIZE_GB
    if size > _MAX_SIZE_GB:
        raise InvalidArgumentError(f"label {LABEL_VSIZE}: too large (got {text}, wanted at most {_MAX_SIZE_GB})")
    return size


def make_upper(data: Path, index: Path, size_gb: int, *, sparse: bool, make_ext4: bool) -> None:
    """Make the files of an empty layer, with an empty ext4 in it if ``make_ext4``.

    On failure nothing of this call is left. Raises FailedPreconditionError if a file is there already: it may be the
    layer of another container, which must be neither shared nor deleted.
    """
    from obdlab.layers.append import AppendUpper
    from obdlab.layers.upper import SparseUpper

    for path in (data, index):
        if os.path.lexists(path):
            raise FailedPreconditionError(f"{path}: exists already, it may be another container's writable layer")
    data.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    # Neither call replaces or deletes an existing file.
    if sparse:
        SparseUpper.create(data, size_gb * _GB, index_path=index).close()
    else:
        AppendUpper.create(data, index, size_gb * _GB).close()
    if not make_ext4:
        return
    try:
        _make_ext4(data, index)
    except BaseException:
        data.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
        raise


def _make_ext4(data: Path, index: Path) -> None:
    from obdlab.layers.stack import WritableStack
    from obdlab.layers.upper import open_upper
    from obdlab.volumes.ext4.mkfs import make_filesystem

    with WritableStack(None, open_upper(data, index)) as disk:
        make_filesystem(disk)
        disk.flush()


def is_only_copy(sealed: Path, upper: UpperConfig) -> bool:
    """Return True if ``sealed`` alone holds the layer: the original renames the data to seal it."""
    return sealed.exists() and not os.path.exists(upper.data)


def seal(upper: UpperConfig, sealed: Path) -> None:
    """Seal a closed layer and add the name ``sealed``. Until :func:`drop`, the seal can be undone."""
    from obdlab.layers.layerfile import sync_directory
    from obdlab.layers.seal import SwitchMark
    from obdlab.layers.upper import open_upper

    with open_upper(upper.data, upper.index) as layer:
        SwitchMark(upper.data).put()
        layer.seal()
    try:
        os.link(upper.data, sealed)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(upper.data, sealed)
    sync_directory(str(sealed))


def _copy(source: str, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def drop(upper: UpperConfig) -> None:
    """Delete the files of a layer that was committed, or is not needed."""
    from obdlab.layers.seal import SwitchMark

    for path in (upper.data, upper.index):
        Path(path).unlink(missing_ok=True)
    SwitchMark(upper.data).remove()


@dataclass(frozen=True, slots=True)
class FsSpec:
    """``type[;mount options[;mkfs options]]``, parsed. None for a missing part."""

    fs_type: str
    mount_options: str | None = None
    mkfs_options: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a text. Raises InvalidArgumentError for a type that is not a plain word."""
        fs_type, *rest = (part.strip() for part in text.split(";", 2))
        if not fs_type.isalnum():
            raise InvalidArgumentError(f"not a file system type (got {fs_type!r} in {text!r})")
        return cls(fs_type, rest[0] if rest else None, tuple(rest[1].split()) if len(rest) > 1 else None)

    @property
    def made_here(self) -> bool:
        """True if making it needs neither a device nor a program."""
        return self.fs_type == "ext4" and self.mkfs_options is None

    def writable_options(self) -> str:
        """Return the mount options for writing."""
        if self.mount_options is not None:
            return self.mount_options
        return {"ext4": "discard", "xfs": "nouuid,discard"}.get(self.fs_type, "")

    def mkfs_command(self, device: Path) -> list[str]:
        """Return the command that makes the file system on a device."""
        options = self.mkfs_options
        if options is None:
            options = {"xfs": ("-f",), "f2fs": ("-S", "-w", "4096"), "ntfs": ("-F", "-f")}.get(self.fs_type, ())
        return ["mkfs", "-t", self.fs_type, *options, str(device)]


class MkfsError(ObdlabError):
    """No file system could be made on a new device."""
