"""The headers of a program or library that the loader reads: its interpreter and the libraries it names.

Parsed by pyelftools: pure Python, maintained, small. LIEF is a much larger parser in native code, and the files are
hostile.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable

MAGIC = b"\x7fELF"
# Bounds on one file. Programs have about ten segments, and the largest name some 200 libraries.
_MAX_SEGMENTS = 256
_MAX_TAGS = 4096
_MAX_NAME = 4096
_MAX_BYTES = 8 << 20
_MALFORMED = (
    *(ELFError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(MemoryError, RecursionError, TypeError, ValueError),
)


@dataclass(frozen=True, slots=True)
class Linked:
    """``needed`` names libraries in order; ``rpath`` and ``runpath`` are lists of directories, as in the file.

    ``written`` has the ranges ``[begin, end)`` of the file that are mapped writable: the loader relocates there.
    """

    machine: str
    #: The first bytes of the file: its word size and byte order.
    ident: bytes
    interpreter: bytes
    needed: tuple[bytes, ...]
    rpath: bytes
    runpath: bytes
    written: tuple[tuple[int, int], ...]


def read_linked(read: Callable[[int, int], bytes], size: int, *, name: str) -> Linked:
    """Read the headers of an ELF file of ``size`` bytes by ``read(offset, length)``.

    Raises FormatError for a malformed file and for one with more in its headers than a program has.
    """
    try:
        return _linked(ELFFile(cast("io.BufferedReader", _Window(read, size, name))), name)
    except FormatError:
        raise
    # pyelftools checks few values before it computes with them: a malformed file makes it raise these.
    except _MALFORMED as error:
        raise FormatError(f"malformed ELF file: {error}", blob=name) from error


def _linked(file: ELFFile, name: str) -> Linked:
    if file["e_phnum"] > _MAX_SEGMENTS:
        raise FormatError("too many segments", blob=name, got=file["e_phnum"], wanted=f"at most {_MAX_SEGMENTS}")
    interpreter, needed, written = b"", [], []
    paths = {"DT_RPATH": b"", "DT_RUNPATH": b""}
    for segment in file.iter_segments():
        if segment["p_type"] == "PT_LOAD" and segment["p_flags"] & 2:
            written.append((segment["p_offset"], segment["p_offset"] + segment["p_filesz"]))
        if isinstance(segment, InterpSegment) and segment["p_filesz"] <= _MAX_NAME:
            interpreter = os.fsencode(segment.get_interp_name())
        if isinstance(segment, DynamicSegment):
            for number, tag in enumerate(segment.iter_tags()):
                if number >= _MAX_TAGS:
                    raise FormatError("too many dynamic tags", blob=name, wanted=f"at most {_MAX_TAGS}")
                if tag.entry.d_tag == "DT_NEEDED":
                    needed.append(os.fsencode(tag.needed))  # type: ignore[attr-defined]
                elif tag.entry.d_tag in paths:
                    paths[tag.entry.d_tag] = os.fsencode(getattr(tag, tag.entry.d_tag[3:].lower()))
    return Linked(
        str(file["e_machine"]),
        MAGIC + bytes([1 if file.elfclass == 32 else 2, 1 if file.little_endian else 2]),
        interpreter,
        tuple(needed),
        paths["DT_RPATH"],
        paths["DT_RUNPATH"],
        tuple(written),
    )


class _Window(io.RawIOBase):
    # A file for pyelftools that refuses to read more than headers take.
    def __init__(self, read: Callable[[int, int], bytes], size: int, name: str) -> None:
        self._read_at = read
        self._size = size
        self._name = name
        self._at = 0
        self._left = _MAX_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        length = left if size < 0 else min(size, left)
        # A read costs at least this much of the bound, so that many small ones end too.
        self._left -= max(length, 64)
        if self._left < 0:
            raise FormatError("headers too large", blob=self._name, wanted=f"at most {_MAX_BYTES} bytes")
        data = self._read_at(self._at, length)
        self._at += length
        return data
