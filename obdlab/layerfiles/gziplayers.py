"""Indexes of gzip layers as files: made, described and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.formats.gzipindex import SEVERAL_MEMBERS
from obdlab.layers.gziptarget import GzipTarget, load_index
from obdlab.layers.gzipwriter import write_gzip_index
from obdlab.localfile import LocalFile
from obdlab.system.newfile import new_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from obdlab.formats.gzipindex import IndexHeader
    from obdlab.layerfiles.writing import Progress


@dataclass(frozen=True, slots=True)
class GzipIndexFacts:
    """The header of an index file. Sizes in bytes."""

    version: int
    #: True if the gzip file has several members, for which the original has no index.
    several_members: bool
    entries: int
    compressed_size: int
    uncompressed_size: int
    index_size: int
    #: Distance of entries that the writer aimed at, and the most content between two.
    span: int
    longest_span: int


def describe_index(path: str | PathLike[str]) -> GzipIndexFacts:
    """Return the facts of an index file. Raises FormatError or CorruptBlobError if it is damaged, SourceError."""
    with LocalFile(path) as file:
        header, table = load_index(file)
    ends = [*table["content"].tolist()[1:], header.uncompressed_size]
    longest = max(end - begin for begin, end in zip(table["content"].tolist(), ends, strict=True))
    return _facts(header, longest)


def make_index(
    layer: str | PathLike[str],
    output: str | PathLike[str],
    *,
    span: int,
    several: bool = False,
    force: bool = False,
    progress: Progress,
) -> GzipIndexFacts:
    """Make the index of a gzip layer. ``progress`` gets the compressed bytes read.

    Raises FormatError if the layer is no sound gzip file, SeveralMembersError if it has several members and they are
    not allowed; SourceError if a file cannot be read or written.
    """
    with LocalFile(layer) as file, new_file(output, force=force) as sink:
        write_gzip_index(_Reading(file, progress), sink, blob=file.name, span=span, several=several)
    return describe_index(output)


def verify_index(layer: str | PathLike[str], index: str | PathLike[str]) -> Iterator[int]:
    """Inflate a gzip layer by its index and check everything; yield the bytes of content done since the last time.

    Raises FormatError or CorruptBlobError.
    """
    with LocalFile(layer) as file, LocalFile(index) as index_file:
        yield from GzipTarget(file, index_file).verify()


def _facts(header: IndexHeader, longest: int) -> GzipIndexFacts:
    return GzipIndexFacts(
        header.version,
        header.version == SEVERAL_MEMBERS,
        header.entries,
        header.compressed_size,
        header.uncompressed_size,
        header.index_size,
        header.span,
        longest,
    )


class _Reading:
    # A local file from its start on, with progress.
    def __init__(self, file: LocalFile, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        rest = self._file.size - self._at
        data = self._file.read_at(self._at, rest if size < 0 else min(size, rest))
        self._at += len(data)
        self._progress(len(data))
        return data
