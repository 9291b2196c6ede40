"""Mounts as containerd's API describes them; the client makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.snapshotter.store import Kind
from obdlab.snapshotter.writable import Mode
from obdlab.system.mount import ERRORS

if TYPE_CHECKING:
    from collections.abc import Sequence

_INDEX_PARAMETER = Path("/sys/module/overlay/parameters/index")
_UID_MAP, _ALL_IDS = Path("/proc/self/uid_map"), ["0", "0", "4294967295"]


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount: file system type, source and options in containerd's words."""

    type: str
    source: str
    options: tuple[str, ...]


def kernel_overlay_options() -> tuple[str, ...]:
    """Return the options every overlay mount gets on this kernel.

    With an index, overlayfs refuses lower directories that were copied or used elsewhere, as snapshots are. In a
    user namespace overlayfs may not write trusted attributes; ``userxattr`` makes it use user attributes.
    """
    index = ("index=off",) if _INDEX_PARAMETER.exists() else ()
    return index + (("userxattr",) if _in_user_namespace() else ())


def _in_user_namespace() -> bool:
    try:
        return _UID_MAP.read_text().split() != _ALL_IDS
    except OSError:  # a kernel without user namespaces
        return False


def snapshot_mounts(
    kind: Kind, fs: Path, work: Path, lowers: Sequence[Path], overlay_options: tuple[str, ...]
) -> list[Mount]:
    """Return how to mount a snapshot whose own files are in ``fs``, over ``lowers``, nearest first.

    A lower is a plain layer's directory or the mount point of an overlaybd image. The result equals that of
    containerd's overlayfs snapshotter: a bind mount if one directory suffices, else one overlay.
    """
    if not lowers:
        return [_bind(fs, "ro" if kind is Kind.VIEW else "rw")]
    if kind is Kind.VIEW and len(lowers) == 1:
        return [_bind(lowers[0], "ro")]
    options = overlay_options
    if kind is Kind.ACTIVE:
        options += (f"workdir={work}", f"upperdir={fs}")
    options += (f"lowerdir={':'.join(map(str, lowers))}",)
    return [Mount("overlay", "overlay", options)]


def device_mounts(mode: Mode, mountpoint: Path, device: Path, fs_type: str) -> list[Mount]:
    """Return how to mount a snapshot that writes to a device of its own."""
    if mode is Mode.DEV:
        # An image must not be able to make the kernel panic on errors.
        errors = (ERRORS,) if fs_type == "ext4" else ()
        return [Mount(fs_type, str(device), ("rw", "discard", *errors))]
    return [_bind(mountpoint, "rw")]


def _bind(source: Path, access: str) -> Mount:
    return Mount("bind", str(source), (access, "rbind"))
