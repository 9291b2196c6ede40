"""What every file system that is read without a mount has in common: directories of names, and paths through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Collection

# What a hostile file system may make a reader hold or do. Each is far above what images have: the largest of public
# registries have about a million files.
#: Names in one directory: some 200 MB as a dictionary.
MAX_NAMES = 1 << 20
#: Pieces of one file on the disk: some 150 MB as a list.
MAX_PIECES = 1 << 20
# Bytes of the paths of one walk, and what each path costs beside its text.
_MAX_PATHS = 512 << 20
_PATH_COST = 64
# Directories below each other; the kernel's PATH_MAX ends before.
_MAX_DEPTH = 2048


class Node(Protocol):
    """An inode, as far as paths go."""

    @property
    def is_directory(self) -> bool:
        """Whether names may be below it."""


class Walk:
    """Bounds one walk over a tree of directories: each is entered once, not too deep, and names have an end."""

    def __init__(self, name: str, max_depth: int = _MAX_DEPTH) -> None:
        self._name = name
        self._max_depth = max_depth
        self._entered: set[int] = set()
        self._left = _MAX_PATHS

    def enter(self, directory: int, path: bytes) -> None:
        """Count a directory that the walk goes into. Raises FormatError for one that was met before, or too deep."""
        if directory in self._entered:
            raise FormatError(f"directory {path[:200]!r} is in the tree twice", blob=self._name, got=directory)
        depth = path.count(b"/")
        if depth > self._max_depth:
            raise FormatError("directories too deep", blob=self._name, got=depth, wanted=f"at most {self._max_depth}")
        self._entered.add(directory)

    def count(self, path: bytes, names: Collection[bytes]) -> None:
        """Count the paths of these names in the directory ``path``, before they are made.

        Raises FormatError if there are more than images have.
        """
        self._left -= sum(map(len, names)) + len(names) * (len(path) + _PATH_COST)
        if self._left < 0:
            raise FormatError("more names than an image has", blob=self._name, wanted=f"{_MAX_PATHS} bytes of paths")


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
