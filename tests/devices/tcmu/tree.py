"""A simulated tree of configfs: directories come with files, and go with them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from obdlab.devices.tcmu import configfs

_MADE_BY_KERNEL = ("control", "enable", "nexus", "address", "attrib", "acls", "np", "lun", "alua")


class Tree:
    """A directory as configfs is: files of the kernel come with a directory, and go with it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._mkdir, self._rmdir = os.mkdir, os.rmdir
        monkeypatch.setattr(configfs, "TARGET", root)
        monkeypatch.setattr(os, "mkdir", self.mkdir)
        monkeypatch.setattr(os, "rmdir", self.rmdir)
        for name in ("core", "loopback", "iscsi"):
            self._mkdir(root / name)

    def mkdir(self, path: str | Path, mode: int = 0o777) -> None:
        self._mkdir(path, mode)
        made = Path(path)
        if self.root not in made.parents:
            return
        kinds = {"dev_": ["attrib"], "tpgt": ["attrib", "acls", "np", "lun"], "lun_": ["alua"]}
        for name in kinds.get(made.name[:4], []):
            self._mkdir(made / name)
        if made.name == "tpgt_1":
            (made / "address").write_text("7:0:1\n")

    def rmdir(self, path: str | Path, *, dir_fd: int | None = None) -> None:
        directory = Path(path)
        if self.root in directory.parents:
            for child in directory.iterdir():
                if child.is_symlink() or child.name not in _MADE_BY_KERNEL or self._is_used(child):
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            for child in sorted(directory.rglob("*"), reverse=True):
                self._rmdir(child) if child.is_dir() else child.unlink()
        self._rmdir(path, dir_fd=dir_fd)

    def _is_used(self, child: Path) -> bool:
        return child.is_dir() and child.name in ("acls", "np", "lun") and any(child.iterdir())

    def left(self) -> list[str]:
        found = (str(path.relative_to(self.root)) for path in self.root.rglob("*"))
        return sorted(path for path in found if path.count("/") and path != "core/user_999999999")
