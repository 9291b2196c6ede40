"""Paths of the host that labels may name: only below directories that the settings allow.

Labels prove nothing: containerd puts annotations of image layers, and Kubernetes annotations of pods, into the
same map. Below an allowed directory only root can change where a path leads.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.snapshotter.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence


def allowed_path(text: str, roots: Sequence[Path], label: str, setting: str) -> Path:
    """Return the path that a label names, with symbolic links resolved. It need not exist.

    Raises InvalidArgumentError unless the path is absolute and below one of ``roots`` (the ``setting``), and unless
    that root and all directories below it on the path belong to this process's user and are writable by no other.
    """
    if not os.path.isabs(text) or "\0" in text:
        raise InvalidArgumentError(f"label {label}: not an absolute path (got {text[:200]!r})")
    path = Path(os.path.realpath(text))
    for root in roots:
        real = Path(os.path.realpath(root))
        if path != real and real not in path.parents:
            continue
        for directory in (real, *(each for each in reversed(path.parents) if real in each.parents)):
            trouble = _trouble(directory)
            if trouble:
                raise InvalidArgumentError(f"label {label}: {directory} {trouble} (in {text[:200]!r})")
        return path
    names = ", ".join(map(str, roots)) or "none"
    raise InvalidArgumentError(
        f"label {label}: not below a directory that {setting} in the snapshotter's configuration allows "
        f"(got {text[:200]!r}, wanted one below: {names})"
    )


def _trouble(directory: Path) -> str:
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return ""  # it will be made later
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a directory"
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        return "can be changed by other users"
    return ""
