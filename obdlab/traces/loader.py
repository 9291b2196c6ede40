"""The libraries of a program, looked for as the loader ld.so does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.errors import FormatError
from obdlab.volumes.elf import read_linked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obdlab.traces.imagefiles import ImageFiles
    from obdlab.volumes.elf import Linked

# Bounds on the work for one program.
_MAX_LIBRARIES = 1024
_MAX_LINE = 4096
_MAX_DIRECTORIES = 64
_MAX_INCLUDES = 64
_TRIPLES = {"EM_X86_64": "x86_64-linux-gnu", "EM_AARCH64": "aarch64-linux-gnu", "EM_386": "i386-linux-gnu"}
_DIRECTORIES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The files that one program or library needs, each with the search path that it inherits.

    ``written`` are the parts that the loader writes to; ``left_out`` says what is missing or malformed.
    """

    files: tuple[tuple[bytes, bytes], ...] = ()
    written: tuple[tuple[int, int], ...] = ()
    left_out: tuple[str, ...] = ()
    is_program: bool = False


class Loader:
    """The loader of one image."""

    def __init__(self, files: ImageFiles) -> None:
        self._files = files
        self._system: tuple[bytes, ...] = ()

    def loaded(self, path: bytes, inherited: bytes, environment: Sequence[str]) -> Loaded:
        """Return the files needed by one that :meth:`ImageFiles.real` returned.

        ``inherited`` is the search path of the program or library that needs it, ``environment`` LD_LIBRARY_PATH.
        """
        size = self._files.size(path)
        try:
            linked = read_linked(lambda at, length: self._files.read(path, at, length), size, name=os.fsdecode(path))
        except FormatError as error:
            return Loaded(left_out=(str(error),))
        files: list[tuple[bytes, bytes]] = []
        left_out = []
        if linked.interpreter:
            found = self._files.real(linked.interpreter)
            if found is not None:
                files.append((found, b""))
        rpath = b"" if linked.runpath else b":".join(filter(None, (linked.rpath, inherited)))
        origin = os.path.dirname(path)
        for name in linked.needed[:_MAX_LIBRARIES]:
            found = self._library(name, linked, rpath, origin, environment)
            if found is None:
                left_out.append(f"{os.fsdecode(name)}: missing, needed by {os.fsdecode(path)}")
            else:
                files.append((found, rpath))
        return Loaded(tuple(files), tuple(linked.written), tuple(left_out), bool(linked.interpreter))

    # The order is that of ld.so(8). ld.so.cache stands for the directories of ld.so.conf and the default ones.
    def _library(
        self, name: bytes, linked: Linked, rpath: bytes, origin: bytes, environment: Sequence[str]
    ) -> bytes | None:
        if b"/" in name:
            return self._files.real(name)
        triple = _TRIPLES.get(linked.machine, "")
        defaults = [f"{each}/{triple}".encode() for each in ("/lib", "/usr/lib")] if triple else []
        defaults += [each.encode() for each in _DIRECTORIES]
        if not self._system:
            self._system = tuple(self._configured()) or (b"/lib",)
        for directory in (
            *_directories(rpath, origin),
            *map(os.fsencode, environment),
            *_directories(linked.runpath, origin),
            *self._system,
            *defaults,
        ):
            found = self._files.real(directory + b"/" + name)
            # ld.so goes on behind a library for other processors.
            if found is not None and self._files.read(found, 0, len(linked.ident)) == linked.ident:
                return found
        return None

    # Yields the directories of ld.so.conf. A start reads ld.so.cache in its place.
    def _configured(self) -> Iterator[bytes]:
        listed = [each for each in self._files.names(b"/etc/ld.so.conf.d") if each.endswith(b".conf")]
        names = [b"/etc/ld.so.conf", *(b"/etc/ld.so.conf.d/" + each for each in listed[:_MAX_INCLUDES])]
        found = []
        for name in names:
            real = self._files.real(name)
            text = self._files.read(real, 0, _MAX_LINE) if real is not None else b""
            found += [line.strip() for line in text.splitlines() if line.strip().startswith(b"/")]
        yield from found[:_MAX_DIRECTORIES]


def _directories(paths: bytes, origin: bytes) -> list[bytes]:
    found = [each for each in paths.split(b":")[:_MAX_DIRECTORIES] if each]
    return [each.replace(b"${ORIGIN}", origin).replace(b"$ORIGIN", origin) for each in found]
