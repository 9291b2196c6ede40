"""Learning a profile of starts from images with a recorded start."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from obdlab.errors import FormatError
from obdlab.traces.likely import suggest
from obdlab.traces.profile import PAGE, File, Profile, Read, key_of
from obdlab.traces.replay import reads_in
from obdlab.traces.sectors import sectors_of_reads
from obdlab.volumes.places import FilePlaces

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from obdlab.layers.stack import Stack

_MAX_EXAMPLES = 256


@dataclass(frozen=True, slots=True)
class Example:
    """One image and its start: the paths of all its files, those that rules lead to, and the reads by path."""

    name: str
    paths: frozenset[str]
    followed: tuple[str, ...]
    reads: Mapping[str, tuple[int, int, tuple[tuple[int, int], ...]]]


def example_of(name: str, disk: Stack, document: Mapping[str, Any], trace: bytes) -> Example:
    """Return an example of the image on ``disk`` with its image config and a recorded trace.

    Raises FormatError and CorruptBlobError for an image or a trace that is damaged or of another image.
    """
    sectors = sectors_of_reads(reads_in(trace, disk, name=name), disk)
    places = FilePlaces(disk)
    pages: dict[bytes, set[int]] = defaultdict(set)
    order: dict[bytes, int] = {}
    links = places.links()
    for number, (begin, end) in enumerate(sectors):
        for found, offset, length in places.files_in(begin * 512, end * 512):
            # A start opens a file by any of its names.
            for path in links.get(found, (found,)):
                order.setdefault(path, number * 1000 // len(sectors))
                pages[path].update(range(offset // PAGE, -(-(offset + length) // PAGE)))
    followed = suggest(disk, document).followed
    return Example(
        name,
        frozenset(map(_text, places.sizes)),
        tuple(map(_text, followed)),
        {_text(path): (places.sizes[path], order[path], _runs(each)) for path, each in pages.items() if path},
    )


def learn(examples: Sequence[Example], *, made: str = "") -> Profile:
    """Return the profile of the examples. Raises FormatError for more than a profile may have."""
    if len(examples) > _MAX_EXAMPLES:
        raise FormatError("too many examples for a profile", got=len(examples), wanted=f"at most {_MAX_EXAMPLES}")
    paths: dict[str, None] = {}
    for example in examples:
        paths |= dict.fromkeys((*example.reads, *example.followed))
    keys = [({key_of(path) for path in each.paths}, {key_of(path) for path in each.followed}) for each in examples]
    files = []
    for path in sorted(paths):
        key = key_of(path)
        contained = [number for number, each in enumerate(examples) if path in each.paths or key in keys[number][0]]
        followed = [number for number in contained if key in keys[number][1]]
        reads = [
            Read(number, size, order, _packed(runs))
            for number, each in enumerate(examples)
            if path in each.reads
            for size, order, runs in (each.reads[path],)
        ]
        if any(number in contained for number in (*followed, *(each.example for each in reads))):
            files.append(File(path, contained, followed, reads))
    return Profile([each.name for each in examples], files, made=made)


def _runs(pages: Iterable[int]) -> tuple[tuple[int, int], ...]:
    found: list[list[int]] = []
    for page in sorted(pages):
        if found and found[-1][1] == page:
            found[-1][1] = page + 1
        else:
            found.append([page, page + 1])
    return tuple((begin, end) for begin, end in found)


def _packed(runs: Iterable[tuple[int, int]]) -> list[int]:
    packed, at = [], 0
    for begin, end in runs:
        packed += [begin - at, end - begin]
        at = end
    return packed


def _text(path: bytes) -> str:
    return path.decode(errors="replace")
