"""Which code is installed, and whether it still is what this process runs.

A host must not serve new devices by old code. (What another machine changes on a shared file system is not seen.)
"""

from __future__ import annotations

import hashlib
import os
import select
from pathlib import Path

from obdlab.devices import abi

_PACKAGE = Path(__file__).parents[1]


class InstalledCode:
    """The package's source files as they are now. Forked children may ask :meth:`changed`, too."""

    def __init__(self, package: Path = _PACKAGE) -> None:
        self._package = package
        # First: what changes in between is seen twice rather than never.
        self._watch = _watch(package)
        #: By which servers of this code are known.
        self.digest = _digest(package)

    def changed(self) -> bool:
        """Whether the files are others now. Costs next to nothing while nobody has touched them."""
        if self._watch >= 0:
            poller = select.poll()
            poller.register(self._watch, select.POLLIN)
            if not poller.poll(0):  # left unread: from the first change on it is looked at each time
                return False
        return self.digest != _digest(self._package)

    def close(self) -> None:
        """Let go of the kernel's watch."""
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


# Returns an inotify descriptor; -1 where the kernel has none left for us.
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
