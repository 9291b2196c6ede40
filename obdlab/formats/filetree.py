"""What every file system that is read without a mount has in common: directories of names, and paths through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol


class Node(Protocol):
    """An inode, as far as paths go."""

    @property
    def is_directory(self) -> bool:
        """Whether names may be below it."""


class FileTree(ABC):
    """Inodes known by number; names are bytes."""

    @property
    @abstractmethod
    def root(self) -> int:
        """Number of the root directory."""

    @abstractmethod
    def inode(self, number: int) -> Node:
        """Return an inode."""

    @abstractmethod
    def entries(self, number: int) -> dict[bytes, tuple[int, int]]:
        """Return a directory's names, with inode number and type, without "." and ".."."""

    def lookup(self, path: bytes) -> int | None:
        """Return the inode number of a path from the root, following no links; None if it is not there."""
        number = self.root
        for part in path.split(b"/"):
            if part in (b"", b"."):
                continue
            if not self.inode(number).is_directory:
                return None
            found = self.entries(number).get(part)
            if found is None:
                return None
            number = found[0]
        return number
