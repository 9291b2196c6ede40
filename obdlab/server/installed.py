"""The digest of the installed code, and whether this process still runs that code.

A host must not serve new devices with old code. (Another machine's changes to a shared file system are not noticed.)
"""

from __future__ import annotations

import hashlib
import os
import select
from pathlib import Path

from obdlab.system import abi

_PACKAGE = Path(__file__).parents[1]


class InstalledCode:
    """The package's source files at construction. Forked children may call :meth:`changed`, too."""

    def __init__(self, package: Path = _PACKAGE) -> None:
        self._package = package
        # Watch first: a change in between is then seen twice rather than never.
        self._watch = _watch(package)
        #: Identifies the code in the records of its servers.
        self.digest = _digest(package)

    def changed(self) -> bool:
        """Whether the files differ now. Costs next to nothing while they are untouched."""
        if self._watch >= 0:
            poller = select.poll()
            poller.register(self._watch, select.POLLIN)
            if not poller.poll(0):  # events stay unread: after the first change every call compares digests
                return False
        return self.digest != _digest(self._package)

    def close(self) -> None:
        """Close the kernel's watch."""
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1


def _digest(package: Path) -> str:
    found = []
    for directory, _, names in os.walk(package):
        for name in names:
            if name.endswith(".py"):
                status = os.stat(os.path.join(directory, name))
                found.append((directory, name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]


# Returns an inotify descriptor, or -1 if the kernel refuses.
def _watch(package: Path) -> int:
    try:
        descriptor = abi.inotify_init()
    except OSError:
        return -1
    try:
        for directory, _, _ in os.walk(package):
            if os.path.basename(directory) != "__pycache__":
                abi.inotify_add_watch(descriptor, Path(directory), abi.IN_CHANGES)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor
