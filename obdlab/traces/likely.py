"""A trace that is derived, not recorded: the likely reads of a start, by the image's own configuration.

Programs of the entrypoint and command are found as execve finds them, with scripts' interpreters, the loader, the
libraries along the loader's search path, and the files that libc and some run-time systems read first. The
disk is read as the kernel will read it, so directories and inodes on the way become part of the trace.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from obdlab.errors import FormatError
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.formats.trace import Trace
from obdlab.traces.replay import reads_of_disk
from obdlab.traces.sets import unique
from obdlab.volumes.detect import FileTree, NoSuchFileError
from obdlab.volumes.elf import MAGIC, read_linked
from obdlab.volumes.noting import NotedDisk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from obdlab.layers.stack import Stack
    from obdlab.volumes.elf import Linked

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Bounds on the work for one image. A start of a large application loads some 200 programs and libraries.
_MAX_FILES = 1024
_MAX_LOOKUPS = 1 << 15
_MAX_WORDS = 64
_MAX_TEXT = 4096
_MAX_DIRECTORIES = 64
_MAX_INCLUDES = 64
#: Larger files are read in part by a start: their head, and of programs the parts that the loader writes to.
WHOLE_SIZE = 2 << 20
_HEAD = 128 << 10
# The kernel looks this far for a script's interpreter.
_TEXT_HEAD = 256
# Bytes read of one disk: directories are read again for each path through them.
_MAX_READ = 1 << 30
#: A directory is looked through again for each path in it, so bytes alone do not bound the time of a hostile image.
_MAX_S = 120.0

_LIBC_FILES = ("/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/localtime")
_LOCALE_FILES = ("/usr/lib/locale/locale-archive", "/usr/lib/locale/C.utf8/LC_CTYPE")
_TRIPLES = {"EM_X86_64": "x86_64-linux-gnu", "EM_AARCH64": "aarch64-linux-gnu", "EM_386": "i386-linux-gnu"}
_DIRECTORIES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")
_PYTHON = re.compile(rb"(.*)/bin/python(3\.(\d{1,2}))")
# Modules that CPython imports before the program's first line.
_PYTHON_START = (
    *("encodings/__init__", "encodings/aliases", "encodings/utf_8", "codecs", "io", "abc", "site", "os", "stat"),
    *("_collections_abc", "posixpath", "genericpath", "_sitebuiltins"),
)
_JAVA = re.compile(rb"(.*)/bin/java")
_JAVA_START = (
    "jvm.cfg",
    "libjli.so",
    "server/libjvm.so",
    "server/classes.jsa",
    "libjava.so",
    "libjimage.so",
    "modules",
)


@dataclass(frozen=True, slots=True)
class Suggested:
    """A trace of the start that is likely, the files it is of in order, and paths or reasons that were left out."""

    trace: Trace
    files: tuple[bytes, ...]
    left_out: tuple[str, ...]


def suggest(disk: Stack, document: Mapping[str, Any]) -> Suggested:
    """Return the likely reads of a start of the image on ``disk`` with the image config ``document``.

    Raises FormatError for an unknown or damaged file system, and the errors of reading the disk. Programs that are
    missing or malformed are left out.
    """
    start = _Start(disk)
    start.follow(document)
    reads = (read for begin, end in start.ranges for read in reads_of_disk(disk, begin, end - begin))
    return Suggested(unique(Trace.from_reads(reads)), tuple(start.files), tuple(start.left_out))


class _Start:
    # Follows one start. `files` has the real paths of the files met, `ranges` the bytes of the disk in order.
    def __init__(self, disk: Stack) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.files: dict[bytes, None] = {}
        self.left_out: list[str] = []
        self._name = disk.name
        self._left = _MAX_READ
        self._deadline = time.monotonic() + _MAX_S
        self._disk = NotedDisk(disk, self._noted)
        self._tree = FileTree(self._disk)
        self._lookups = 0
        self._found: dict[bytes, bytes | None] = {}

    def _noted(self, begin: int, end: int) -> None:
        self._left -= end - begin
        if self._left < 0:
            raise FormatError("start takes too many reads", blob=self._name, wanted=f"at most {_MAX_READ} bytes")
        if time.monotonic() > self._deadline:
            raise FormatError("start takes too long to follow", blob=self._name, wanted=f"at most {_MAX_S:g} s")
        self.ranges.append((begin, end))

    def follow(self, document: Mapping[str, Any]) -> None:
        config = document.get("config")
        config = config if isinstance(config, dict) else {}
        environment = dict(each.partition("=")[::2] for each in _texts(config.get("Env")))
        path = environment.get("PATH") or _PATH
        directory = config.get("WorkingDir")
        place = directory if isinstance(directory, str) and directory.startswith("/") else "/"
        self._system: tuple[bytes, ...] = ()
        preload = environment.get("LD_LIBRARY_PATH", "")
        self._environment = _directories(os.fsencode(preload), b"/")
        for program in _programs(config):
            found = self._program(program, path.split(":")[:_MAX_DIRECTORIES], place)
            if found is None:
                self.left_out.append(f"{program}: missing")
            else:
                self._load(found)
        if self.files:
            for name in (*_LIBC_FILES, *_LOCALE_FILES):
                self._add(name.encode())

    # Returns the real path of a program, as execvp looks for it.
    def _program(self, name: str, path: Sequence[str], place: str) -> bytes | None:
        if "/" in name:
            return self._real(os.fsencode(os.path.join(place, name)))
        found = (self._real(os.fsencode(os.path.join(place, each, name))) for each in path)
        return next((each for each in found if each is not None), None)

    def _real(self, path: bytes) -> bytes | None:
        if path in self._found:
            return self._found[path]
        self._lookups += 1
        if self._lookups > _MAX_LOOKUPS or b"\0" in path or len(path) > _MAX_TEXT:
            return None
        try:
            found: bytes | None = self._tree.real_path(path)
            if found is not None and not stat.S_ISREG(self._tree.inode(self._tree.find(found)).mode):
                found = None
        except NoSuchFileError:
            found = None
        self._found[path] = found
        return found

    # Adds a program with all that it loads: breadth first, as the loader does.
    def _load(self, program: bytes) -> None:
        pending: deque[tuple[bytes, bytes]] = deque([(program, b"")])  # with the rpaths of those that load it
        while pending:
            path, inherited = pending.popleft()
            if path in self.files or not self._add(path):
                continue
            head = self._read(path, 0, _TEXT_HEAD)
            if head.startswith(b"#!"):
                pending += ((each, b"") for each in self._interpreters(head))
            elif head.startswith(MAGIC):
                pending += self._linked(path, inherited)
                self._run_time(path)

    def _interpreters(self, head: bytes) -> Iterator[bytes]:
        words = head[2:].split(b"\n")[0].split()[:4]
        for number, word in enumerate(words):
            if number and os.path.basename(words[0]) != b"env":
                break
            if not word.startswith(b"-"):
                found = self._program(os.fsdecode(word), _PATH.split(":"), "/")
                if found is not None:
                    yield found

    def _linked(self, path: bytes, inherited: bytes) -> Iterator[tuple[bytes, bytes]]:
        number = self._tree.find(path)
        size = self._tree.inode(number).size
        try:
            linked = read_linked(lambda at, length: self._read(path, at, length), size, name=os.fsdecode(path))
        except FormatError as error:
            self.left_out.append(str(error))
            return
        if size > WHOLE_SIZE:
            for begin, end in linked.written:
                self._note(path, begin, min(end, begin + WHOLE_SIZE))
        if linked.interpreter:
            found = self._real(linked.interpreter)
            if found is not None:
                yield found, b""
            self._add(b"/etc/ld.so.cache")
        rpath = b"" if linked.runpath else b":".join(filter(None, (linked.rpath, inherited)))
        for name in linked.needed[:_MAX_FILES]:
            found = self._library(name, linked, rpath, os.path.dirname(path))
            if found is None:
                self.left_out.append(f"{os.fsdecode(name)}: missing, needed by {os.fsdecode(path)}")
            else:
                yield found, rpath

    # The order is that of ld.so(8). ld.so.cache stands for the directories of ld.so.conf and the default ones.
    def _library(self, name: bytes, linked: Linked, rpath: bytes, origin: bytes) -> bytes | None:
        if b"/" in name:
            return self._real(name)
        triple = _TRIPLES.get(linked.machine, "")
        defaults = [f"{each}/{triple}".encode() for each in ("/lib", "/usr/lib")] if triple else []
        defaults += [each.encode() for each in _DIRECTORIES]
        if not self._system:
            self._system = tuple(self._configured()) or (b"/lib",)
        for directory in (
            *_directories(rpath, origin),
            *self._environment,
            *_directories(linked.runpath, origin),
            *self._system,
            *defaults,
        ):
            found = self._real(directory + b"/" + name)
            # ld.so goes on behind a library for other processors.
            if found is not None and self._read(found, 0, len(linked.ident)) == linked.ident:
                return found
        return None

    # Yields the directories of ld.so.conf, without noting the reads: a start reads ld.so.cache in its place.
    def _configured(self) -> Iterator[bytes]:
        noted = len(self.ranges)
        try:
            names = [b"/etc/ld.so.conf"]
            listed = self._tree.entries(self._tree.find(b"/etc/ld.so.conf.d"))
            names += [b"/etc/ld.so.conf.d/" + each for each in listed if each.endswith(b".conf")][:_MAX_INCLUDES]
        except NoSuchFileError:
            pass
        found = []
        for name in names:
            real = self._real(name)
            text = self._read(real, 0, _MAX_TEXT) if real is not None else b""
            found += [line.strip() for line in text.splitlines() if line.strip().startswith(b"/")]
        del self.ranges[noted:]
        yield from found[:_MAX_DIRECTORIES]

    def _run_time(self, path: bytes) -> None:
        python, java = _PYTHON.fullmatch(path), _JAVA.fullmatch(path)
        if python:
            prefix, version, minor = (each.decode(errors="surrogateescape") for each in python.groups())
            for module in _PYTHON_START:
                directory, _, name = f"{prefix}/lib/python{version}/{module}".rpartition("/")
                self._add(os.fsencode(f"{directory}/{name}.py"))
                self._add(os.fsencode(f"{directory}/__pycache__/{name}.cpython-3{minor}.pyc"))
        elif java:
            for name in _JAVA_START:
                self._add(java[1] + b"/lib/" + name.encode())

    # Notes a file's data; returns False if it is missing or there are too many.
    def _add(self, name: bytes) -> bool:
        path = self._real(name)
        if path is None or path in self.files:
            return False
        if len(self.files) >= _MAX_FILES:
            self.left_out.append(f"{os.fsdecode(path)}: more than {_MAX_FILES} files")
            return False
        self.files[path] = None
        size = self._tree.inode(self._tree.find(path)).size
        self._note(path, 0, size if size <= WHOLE_SIZE else _HEAD)
        return True

    def _pieces(self, path: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        volume: Any = self._tree.volume
        for at, length, place in volume.places(self._tree.inode(self._tree.find(path))):
            first, last = max(begin, at), min(end, at + length)
            if first < last:
                yield first, last, place + first - at

    def _note(self, path: bytes, begin: int, end: int) -> None:
        for first, last, place in self._pieces(path, begin, end):
            stop = place + last - first
            self.ranges.append((place // SECTOR * SECTOR, -(-stop // SECTOR) * SECTOR))

    # Returns bytes of a file with holes as zeros; less at its end.
    def _read(self, path: bytes, offset: int, length: int) -> bytes:
        size = self._tree.inode(self._tree.find(path)).size
        data = bytearray(max(0, min(length, size - offset)))
        for first, last, place in self._pieces(path, offset, offset + len(data)):
            data[first - offset : last - offset] = self._disk.read_at(place, last - first)
        return bytes(data)


def _texts(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


# An entrypoint is often a script that ends in exec "$@": the command's first word is a program, too.
def _programs(config: Mapping[str, Any]) -> list[str]:
    found: dict[str, None] = {}
    for words in (_texts(config.get("Entrypoint")), _texts(config.get("Cmd"))):
        if words and words[0] and not words[0].startswith("-"):
            found[words[0]] = None
        for option, text in pairwise(words):
            if option == "-c" and len(text) <= _MAX_TEXT:
                try:
                    inner = shlex.split(text, comments=True)
                except ValueError:  # an open quote: the shell will complain
                    continue
                found |= dict.fromkeys(each for each in inner[:2] if each and each != "exec" and each[0] not in "-$")
    return list(found)[:_MAX_WORDS]


def _directories(paths: bytes, origin: bytes) -> list[bytes]:
    found = [each for each in paths.split(b":")[:_MAX_DIRECTORIES] if each]
    return [each.replace(b"${ORIGIN}", origin).replace(b"$ORIGIN", origin) for each in found]
