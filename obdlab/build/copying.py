"""COPY and ADD: files of a build context, or of an image, into the root of another image.

Source: Dockerfile reference, "COPY" and "ADD". A source that is a link is followed inside its own tree, links below a
source are copied as links. Owner and mode are those of the source for files of an image, and root's otherwise.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.build.dockerfile import BuildError
from obdlab.build.ignorefile import Ignored, compiled
from obdlab.build.inside import Ownership, make_directory, open_regular, pieces, remove_file
from obdlab.system import abi

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from obdlab.build.inside import Inside

_DEEPEST = 256
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_COPIED_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
_NODES = {stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, directory or link below a source. ``open`` returns a descriptor of a regular file."""

    #: Below the source; b"" for the source itself.
    path: bytes
    status: os.stat_result
    link: bytes = b""
    open: Callable[[], int] = field(default=lambda: -1, compare=False)

    @property
    def kind(self) -> int:
        """The type bits of its mode."""
        return stat.S_IFMT(self.status.st_mode)


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree that files are copied from: a context, without the ignored paths, or the root of an image."""

    inside: Inside
    ignored: Ignored = field(default_factory=Ignored)
    #: Whether the files' owners, extended attributes and device nodes are copied, too.
    is_image: bool = False

    def select(self, pattern: str, place: str) -> list[str]:
        """Return the paths that a source names, which may have wildcards; relative, without ".." in them.

        Raises BuildError, which begins with ``place``, if no path fits, or if the pattern leads out of a context.
        """
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        if ".." in parts:
            clean = posixpath.normpath("/".join(parts))
            if not self.is_image and clean.split("/")[0] == "..":
                raise BuildError(f"{place}: {pattern!r} leads out of the build context")
            clean = posixpath.normpath("/" + clean)
            parts = [part for part in clean.split("/") if part]
        found = [""]
        for part in parts:
            found = list(self._below(found, part, place))
            if not found:
                raise BuildError(f"{place}: {pattern!r} names no file of {self._name}")
        return found

    @property
    def _name(self) -> str:
        return "the image" if self.is_image else "the build context (or is left out by .dockerignore)"

    def _below(self, parents: list[str], part: str, place: str) -> Iterator[str]:
        for parent in parents:
            if not set(part) & set("*?[\\"):
                path = f"{parent}/{part}" if parent else part
                if self._has(path):
                    yield path
                continue
            wanted = compiled(part, place)
            try:
                with self.inside.directory(os.fsencode(parent)) as directory:
                    names = sorted(map(os.fsdecode, os.listdir(directory)))
            except NotADirectoryError:
                continue
            for name in names:
                path = f"{parent}/{name}" if parent else name
                if wanted.fullmatch(name) and self._has(path):
                    yield path

    def _has(self, path: str) -> bool:
        if path in self.ignored and not self.ignored.has_exceptions:
            return False
        found = self.inside.status(os.fsencode(path))
        return found is not None and (path not in self.ignored or stat.S_ISDIR(found.st_mode))

    def entries(self, path: str) -> Generator[Entry]:
        """Yield a source and everything below it, directories before their content, in the order of names.

        A descriptor that an entry uses is valid until the next one. Raises OSError.
        """
        raw = os.fsencode(path)
        found = self.inside.status(raw)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            with self.inside.parent(self._real(raw)) as (parent, name):
                yield Entry(b"", found, open=lambda: open_regular(parent, name))
            return
        with self.inside.directory(raw) as directory:
            yield Entry(b"", os.fstat(directory))
            yield from self._walk(directory, b"", raw.strip(b"/"), 0)

    def _real(self, path: bytes) -> bytes:
        # The kernel knows where a chain of links inside the tree ends.
        descriptor = abi.open_in_root(self.inside.descriptor, path, os.O_PATH)
        try:
            real = os.fsencode(os.readlink(f"/proc/self/fd/{descriptor}"))
            base = os.fsencode(os.readlink(f"/proc/self/fd/{self.inside.descriptor}"))
        finally:
            os.close(descriptor)
        return os.path.relpath(real, base)

    def _walk(self, directory: int, path: bytes, whole: bytes, depth: int) -> Iterator[Entry]:
        if depth > _DEEPEST:
            raise OSError(0, f"directories nested more than {_DEEPEST} deep", os.fsdecode(whole))
        for name in sorted(os.fsencode(each) for each in os.listdir(directory)):
            below, in_tree = os.path.join(path, name), os.path.join(whole, name)
            left_out = os.fsdecode(in_tree) in self.ignored
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                if left_out and not self.ignored.has_exceptions:
                    continue
                yield from self._directory(directory, name, Entry(below, status), in_tree, depth, left_out)
            elif not left_out:
                yield self._other(directory, name, below, status)

    # A directory that is left out is there nevertheless, if one of its files is an exception.
    def _directory(
        self, parent: int, name: bytes, entry: Entry, in_tree: bytes, depth: int, left_out: bool
    ) -> Iterator[Entry]:
        with ExitStack() as opened:
            directory = os.open(name, _READ, dir_fd=parent)
            opened.callback(os.close, directory)
            children = self._walk(directory, entry.path, in_tree, depth + 1)
            if left_out:
                first = next(children, None)
                if first is None:
                    return
                yield entry
                yield first
            else:
                yield entry
            yield from children

    def _other(self, parent: int, name: bytes, path: bytes, status: os.stat_result) -> Entry:
        if stat.S_ISLNK(status.st_mode):
            return Entry(path, status, link=os.readlink(name, dir_fd=parent))
        return Entry(path, status, open=lambda: open_regular(parent, name))


class ContentDigest:
    """The digest of everything that copying entries writes: names, types, modes, content; not times."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def begin(self, entry: Entry) -> None:
        """Add an entry; its content comes by :meth:`content`."""
        mode, size = entry.status.st_mode, entry.status.st_size if entry.kind == stat.S_IFREG else 0
        for part in (entry.path, entry.link, f"{mode:o} {size}".encode()):
            self._hash.update(len(part).to_bytes(8, "little") + part)

    def text(self, text: str) -> None:
        """Add a text, such as where the next entries go."""
        self._hash.update(b"\xff" + len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogateescape"))

    def content(self, data: bytes) -> None:
        """Add the next bytes of the entry."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """Return the digest of all entries so far."""
        return self._hash.hexdigest()


def digest_of(sources: Iterable[tuple[Tree, str]]) -> str:
    """Return the digest of the content of sources, each a path of a tree. Raises OSError."""
    digest = ContentDigest()
    for tree, path in sources:
        digest.text(posixpath.basename(path))
        for entry in tree.entries(path):
            digest.begin(entry)
            if entry.kind == stat.S_IFREG:
                for piece in _pieces_of(entry):
                    digest.content(piece)
    return digest.hexdigest()


def _pieces_of(entry: Entry) -> Iterator[bytes]:
    descriptor = entry.open()
    try:
        yield from pieces(descriptor)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class Copier:
    """Copies into the root of an image. ``owner`` and ``mode`` replace those of the source."""

    root: Inside
    owner: Ownership | None = None
    mode: int | None = None
    #: Of what was copied: equal to :func:`digest_of` unless the source has changed since.
    digest: ContentDigest = field(default_factory=ContentDigest)
    _times: list[tuple[bytes, tuple[int, int]]] = field(default_factory=list)

    def copy(self, tree: Tree, path: str, target: str, *, into: bool) -> None:
        """Copy a source: the content of a directory to ``target``, a file to it, or below it if ``into``.

        Raises OSError, with the path in the image.
        """
        self.digest.text(posixpath.basename(path))
        made = self.owner or Ownership()
        for entry in tree.entries(path):
            self.digest.begin(entry)
            at = os.fsencode(target)
            if entry.path:
                at = os.path.join(at, entry.path)
            elif entry.kind != stat.S_IFDIR and into:
                at = os.path.join(at, os.path.basename(os.fsencode(path)))
            if not entry.path:
                self.root.make_directories(at if entry.kind == stat.S_IFDIR else os.path.dirname(at), made)
            self.put(entry, at, tree)
        self.finish()

    def put(self, entry: Entry, at: bytes, tree: Tree) -> None:
        """Copy one entry to a path whose parent exists. Raises OSError."""
        owner = self.owner or (Ownership(entry.status.st_uid, entry.status.st_gid) if tree.is_image else Ownership())
        mode = stat.S_IMODE(entry.status.st_mode) if self.mode is None else self.mode
        if entry.kind == stat.S_IFDIR:
            self.directory(at, entry, owner, mode)
            return
        if entry.kind not in _COPIED_TYPES and not (tree.is_image and entry.kind in _NODES):
            return  # sockets mean nothing without their process, as for Docker
        with self.root.parent(at) as (parent, name):
            remove_file(parent, name)
            times = (entry.status.st_mtime_ns, entry.status.st_mtime_ns)
            if entry.kind == stat.S_IFLNK:
                os.symlink(entry.link, name, dir_fd=parent)
            elif entry.kind == stat.S_IFREG:
                self._file(parent, name, entry, owner, mode, with_attributes=tree.is_image)
            else:
                os.mknod(name, entry.kind | mode, entry.status.st_rdev, dir_fd=parent)
            if entry.kind != stat.S_IFREG:
                os.chown(name, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)

    def directory(self, at: bytes, entry: Entry, owner: Ownership, mode: int) -> None:
        """Make a directory unless there is one, which stays as it is. Raises OSError for something else."""
        found = self.root.status(at)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(20, "is not a directory in the image", os.fsdecode(at))
        if found is None:
            with self.root.parent(at) as (parent, name):
                make_directory(parent, name, owner, mode)
            self._times.append((at, (entry.status.st_mtime_ns, entry.status.st_mtime_ns)))

    def finish(self) -> None:
        """Set the times of the new directories, once nothing more is written to them. Raises OSError."""
        for path, times in reversed(self._times):
            with self.root.directory(path) as directory:
                os.utime(directory, ns=times)
        self._times.clear()

    def _file(
        self, parent: int, name: bytes, entry: Entry, owner: Ownership, mode: int, *, with_attributes: bool
    ) -> None:
        source = entry.open()
        try:
            target = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent
            )
            try:
                for piece in pieces(source):
                    self.digest.content(piece)
                    write_all(target, piece)
                os.fchown(target, owner.uid, owner.gid)
                os.fchmod(target, mode)
                if with_attributes:
                    for attribute in os.listxattr(source):
                        os.setxattr(target, attribute, os.getxattr(source, attribute))
            finally:
                os.close(target)
        finally:
            os.close(source)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data``. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
