"""Common base of the file systems that are read without a mount: directories of names, and paths through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

# Bounds on a reader's memory and work for a hostile file system. Each is far above real images: the largest of
# public registries have about a million files.
#: Names in one directory: some 200 MB as a dictionary.
MAX_NAMES = 1 << 20
#: Pieces of one file on the disk: some 150 MB as a list.
MAX_PIECES = 1 << 20
# Bytes of all paths of one walk, and the cost of each path beside its text.
_MAX_PATHS = 512 << 20
_PATH_COST = 64
# Depth of nested directories; the kernel's PATH_MAX is reached before.
_MAX_DEPTH = 2048


class Node(Protocol):
    """An inode, as paths need it."""

    @property
    def is_directory(self) -> bool:
        """True if the inode can have names below it."""


class Walk:
    """Bounds of one walk over a tree: a directory is entered once; depth and total length of paths are limited."""

    def __init__(self, name: str, max_depth: int = _MAX_DEPTH) -> None:
        self._name = name
        self._max_depth = max_depth
        self._entered: set[int] = set()
        self._left = _MAX_PATHS

    def enter(self, directory: int, path: bytes) -> None:
        """Count a directory that the walk enters. Raises FormatError if it was entered before or is too deep."""
        if directory in self._entered:
            raise FormatError(f"directory {path[:200]!r} is in the tree twice", blob=self._name, got=directory)
        depth = path.count(b"/")
        if depth > self._max_depth:
            raise FormatError("directories too deep", blob=self._name, got=depth, wanted=f"at most {self._max_depth}")
        self._entered.add(directory)

    def count(self, path: bytes, names: Collection[bytes]) -> None:
        """Count the paths of these names in the directory ``path``, before they are made.

        Raises FormatError if the walk has more paths than an image may have.
        """
        self._left -= sum(map(len, names)) + len(names) * (len(path) + _PATH_COST)
        if self._left < 0:
            raise FormatError("more names than an image has", blob=self._name, wanted=f"{_MAX_PATHS} bytes of paths")


InodeT = TypeVar("InodeT", bound=Node)


class FileTree(ABC, Generic[InodeT]):
    """Inodes by number; names are bytes."""

    #: In error messages.
    name: str

    @property
    @abstractmethod
    def root(self) -> int:
        """Number of the root directory."""

    @abstractmethod
    def inode(self, number: int) -> InodeT:
        """Return an inode."""

    @abstractmethod
    def entries(self, number: int) -> dict[bytes, tuple[int, int]]:
        """Return a directory's names, with inode number and type, without "." and ".."."""

    def identity(self, number: int, directory: InodeT) -> int:
        """Return a number by which a walk recognises a directory that it has entered before."""
        return number

    def walk(self) -> Iterator[tuple[bytes, int, InodeT]]:
        """Yield (path, inode number, inode) of everything, the root (b"") first, in the order of directories."""
        pending = [(b"", self.root)]
        bounds = Walk(self.name)
        while pending:
            path, number = pending.pop()
            inode = self.inode(number)
            yield path, number, inode
            if not inode.is_directory:
                continue
            bounds.enter(self.identity(number, inode), path)
            found = self.entries(number)
            bounds.count(path, found)
            pending += [(path + b"/" + name, child) for name, (child, _) in found.items()][::-1]

    def lookup(self, path: bytes) -> int | None:
        """Return the inode number of a path from the root, or None if it is missing. Does not follow links."""
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
