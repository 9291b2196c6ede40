"""Replaying a trace: an image's reads become ranges of its blobs, which are fetched ahead."""

from __future__ import annotations

import logging
import os
from itertools import islice
from typing import TYPE_CHECKING

from obdlab.blob import find, range_in
from obdlab.cache.ahead.prefetch import Prefetch
from obdlab.cache.cachedblob import CachedBlob
from obdlab.errors import CorruptBlobError, FormatError, ObdlabError
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.formats.oci import digest_of
from obdlab.formats.trace import (
    HEADER_SIZE,
    MAX_LENGTH,
    MAX_SIZE,
    MOST_READS,
    PriorityList,
    Trace,
    content_of_layer,
    is_trace,
)
from obdlab.layers.warp import parts_of
from obdlab.localfile import LocalFile
from obdlab.observe.counters import Counter
from obdlab.volumes.places import FileVolume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from obdlab.blob import Blob
    from obdlab.cache.ahead.prefetch import Range
    from obdlab.layers.stack import Stack

    Read = tuple[int, int, int]

logger = logging.getLogger(__name__)

_MISSING_SHOWN = 5
#: Counts traces that could not be used.
TRACES_IGNORED = Counter("traces_ignored")


def start_replay(name: str, load: Callable[[], bytes], disk: Stack) -> Prefetch | None:
    """Begin to fetch the ranges of the trace or priority list that ``load`` returns; None if no layer is remote.

    ``load`` is called in the background. A missing trace or one of another image is ignored with a warning.
    """
    blobs: list[CachedBlob] = []
    places = [_stored(layer.data, blobs) for layer in disk.layers]
    if not blobs:
        return None

    def find() -> Iterator[Range]:
        try:
            yield from _ranges(_each_read_in(load(), disk, name), disk, places)
        except ObdlabError:
            TRACES_IGNORED.add()
            raise

    prefetch = Prefetch(name, blobs, find)
    prefetch.start()
    return prefetch


def reads_in(data: bytes, disk: Stack, *, name: str) -> list[Read]:
    """Return (layer, offset, length) of each read in a trace or a priority list, in order.

    Raises FormatError for a trace that is damaged or of another image. Missing files of a list are left out.
    """
    return list(_each_read_in(data, disk, name))


def _each_read_in(data: bytes, disk: Stack, name: str) -> Iterator[Read]:
    if is_trace(data):
        trace = Trace.from_bytes(data, name=name)
        trace.check_fits([layer.data.size for layer in disk.layers], name=name)
        return trace.each_read()
    listed, odd = PriorityList.from_bytes(data, name=name)
    for reason in odd:
        logger.warning("%s", reason)
    return islice(_listed_reads(listed, disk, name), MOST_READS)  # several files may have one place on the disk


def load_file(path: str) -> bytes:
    """Read a trace or a priority list. Raises SourceError or FormatError naming the file."""
    with LocalFile(path) as file:
        return _read_all(file)


def load_blob(blob: Blob, digest: str) -> bytes:
    """Read a trace from its blob, and close the blob.

    Raises as reading does, and FormatError, also if the blob does not match its digest.
    """
    with blob:
        return _read_all(blob, digest)


def load_layer(blob: Blob, digest: str = "") -> bytes:
    """Read the trace in an acceleration layer, and close the blob; without ``digest`` it is not checked.

    Raises as :func:`load_blob` does.
    """
    with blob:
        return content_of_layer(_read_all(blob, digest), name=blob.name)


def _read_all(blob: Blob, digest: str = "") -> bytes:
    if blob.size > MAX_SIZE + (64 << 10):
        raise FormatError("trace is too large", blob=blob.name, got=blob.size, wanted=f"at most {MAX_SIZE}")
    if blob.size == 0:
        raise FormatError("trace is empty", blob=blob.name, wanted=f"at least {HEADER_SIZE} bytes")
    data = blob.read_at(0, blob.size)
    if digest and digest_of(data) != digest:
        blob.evict(0, blob.size)  # forget the cached copy, and read past mirrors
        data = blob.read_at(0, blob.size)
        if digest_of(data) != digest:
            raise CorruptBlobError("wrong content", blob=blob.name, got=digest_of(data), wanted=digest)
    return data


# -- from a layer's uncompressed file to its blob --------------------------------------------------------------------


class _Place:
    # The storage of a layer's data: cached blobs, by the part of the data that each has, and their numbers.
    def __init__(self, data: Blob, cached: Mapping[Blob, tuple[int, CachedBlob]]) -> None:
        self._data = data
        self._cached = cached

    def ranges_of(self, offset: int, length: int) -> Iterator[Range]:
        for part, begin, end in parts_of(self._data, offset, offset + length):
            if part in self._cached:
                number, cached = self._cached[part]
                yield number, *range_in(cached, part, begin, end)


def _stored(data: Blob, blobs: list[CachedBlob]) -> _Place | None:
    found = {}
    for part, _, _ in parts_of(data, 0, data.size):
        cached = find(part, CachedBlob)
        if cached is not None:
            if cached not in blobs:
                blobs.append(cached)
            found[part] = blobs.index(cached), cached
    return _Place(data, found) if found else None


def _ranges(reads: Iterable[Read], disk: Stack, places: Sequence[_Place | None]) -> Iterator[Range]:
    for layer, offset, length in reads:
        place = places[layer]
        if place is not None and length:
            yield from place.ranges_of(offset, length)


# -- priority lists --------------------------------------------------------------------------------------------------


def _listed_reads(listed: PriorityList, disk: Stack, name: str) -> Iterator[Read]:
    volume = FileVolume(disk)
    missing: list[str] = []
    for path in _files(listed, volume, missing):
        try:
            places = volume.places_of(path)
        except ObdlabError as error:
            logger.warning("%s: %s", os.fsdecode(path), error)
            continue
        for _, length, place in places or ():
            yield from reads_of_disk(disk, place, length)
    if missing:
        shown = ", ".join(missing[:_MISSING_SHOWN]) + (", ..." if len(missing) > _MISSING_SHOWN else "")
        of = len(listed.files) + len(listed.directories)
        logger.warning("%s: %d of %d paths are not in the image: %s", name, len(missing), of, shown)


def _files(listed: PriorityList, volume: FileVolume, missing: list[str]) -> Iterator[bytes]:
    yield from _real_paths(listed.files, volume, missing)
    prefixes = tuple(path.rstrip(b"/") + b"/" for path in _real_paths(listed.directories, volume, missing))
    if prefixes:
        for path, is_directory in volume.paths():
            if (path + b"/").startswith(prefixes) and not is_directory:
                yield path


# Resolves links, as the kernel reads their targets.
def _real_paths(names: Iterable[str], volume: FileVolume, missing: list[str]) -> Iterator[bytes]:
    for name in names:
        try:
            path = volume.real_path(os.fsencode(name))
        except ObdlabError as error:
            logger.warning("%s: %s", name, error)
            continue
        if path is None:
            missing.append(name)
        else:
            yield path


def reads_of_disk(disk: Stack, offset: int, length: int) -> Iterator[Read]:
    """Yield the reads of layers, of at most 1 MiB, that a read of the disk consists of."""
    top = len(disk.layers) - 1
    end = min(offset + length, disk.size)
    if offset >= end:
        return
    for _, count, tag, moffset in disk.index.lookup(offset // SECTOR, -(-end // SECTOR)):
        if tag < 0:
            continue
        begin, stop = moffset * SECTOR, (moffset + count) * SECTOR
        for at in range(begin, stop, MAX_LENGTH):
            yield top - tag, at, min(MAX_LENGTH, stop - at)


def trace_beside(directory: str) -> str | None:
    """Return the path of the trace that containerd unpacked into an acceleration layer's directory, or None."""
    path = os.path.join(directory, "trace") if directory else ""
    try:
        return path if path and os.path.getsize(path) > 0 else None
    except OSError:
        return None
