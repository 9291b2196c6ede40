"""A start as the kernel saw it: its reads of the disk, mapped to files and layers, and the waiting time of each."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from obdlab.blob import chain, range_in
from obdlab.errors import FormatError
from obdlab.formats.lsmt.layout import SECTOR
from obdlab.formats.trace import Trace
from obdlab.frames import pandas_or_error
from obdlab.layers.warp import parts_of
from obdlab.traces.replay import reads_of_disk
from obdlab.traces.sets import coverage, difference, unique
from obdlab.volumes.places import FilePlaces

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pandas as pd

    from obdlab.blob import Blob
    from obdlab.contrib.traces_extra.blockevents import DiskRead
    from obdlab.layers.stack import Stack

log = logging.getLogger(__name__)

#: A read that takes longer was not served from memory or a local disk.
THERE_WITHIN_MS = 2.0


#: Kinds of reads: of no file, the dynamic loader and its tables, shared libraries, any other file.
KINDS = ("metadata", "loader", "libraries", "application")


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of a read of the disk: of one file, or of no file."""

    #: Of the read: begin since the first read, and duration (None: unknown).
    at_ms: float
    took_ms: float | None
    offset: int
    length: int
    #: The layers it comes from, 0 being the lowest; empty for a hole.
    layers: tuple[int, ...]
    #: None: metadata of the file system, or a file system that is unknown here.
    path: bytes | None
    process: str
    pid: int
    #: True for the kernel's read-ahead, which no process has asked for yet.
    is_ahead: bool
    #: True if a trace names all of it; None without a trace.
    in_trace: bool | None
    #: ``there``, ``waited`` (by its duration) or ``untold``; with a trace ``prefetched`` (there, and named), ``late``
    #: (waited for although named), ``missed`` (waited for, not named) or ``there``.
    state: str


@dataclass(frozen=True, slots=True)
class Share:
    """The steps of one kind: their number, their bytes, and the time in which one of them waited."""

    steps: int
    size: int
    waited_ms: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Sizes in bytes; ``coverage`` and ``over_read`` are None without a trace."""

    reads: int
    size: int
    processes: int
    files: int
    #: From the first read's begin to the last one's end, and the part of it in which some read waited.
    span_ms: float
    waited_ms: float
    #: Distinct bytes of layers that were read, as stored (compressed), whole blocks.
    stored_size: int
    #: The share of the bytes read that the trace names.
    coverage: float | None
    #: The share of the trace that was not read.
    over_read: float | None

    def optimum_ms(self, rate_mbit: float, rtt_ms: float) -> float:
        """Return the time for fetching the stored bytes once: at the line rate, plus one round trip."""
        return self.stored_size * 8e-3 / rate_mbit + rtt_ms


def check_inside(reads: Iterable[DiskRead], size: int, *, name: str = "events") -> None:
    """Raise FormatError unless the reads lie inside of a disk of that size."""
    for number, read in enumerate(reads):
        if read.offset + read.length > size:
            raise FormatError(
                f"reads are not of this image (read {number})",
                blob=name,
                got=f"[{read.offset}, {read.offset + read.length})",
                wanted=f"inside of {size} bytes",
            )


def trace_of(reads: Iterable[DiskRead], disk: Stack) -> Trace:
    """Return reads of the disk as a trace (reads of its layers), every byte once."""
    return unique(Trace.from_reads(part for read in reads for part in reads_of_disk(disk, read.offset, read.length)))


def timeline(
    reads: Sequence[DiskRead], disk: Stack, trace: Trace | None = None, *, there_within_ms: float = THERE_WITHIN_MS
) -> list[Step]:
    """Return the steps of a start in the order of its reads.

    ``trace`` is the trace that was replayed meanwhile. Raises FormatError for reads that are not of this disk.
    """
    check_inside(reads, disk.size)
    began_s = reads[0].at_s if reads else 0.0
    files = _Files(disk)
    named = None if trace is None else coverage(trace)
    steps = []
    for read in reads:
        at_ms, took_ms = (read.at_s - began_s) * 1e3, None if read.took_s is None else read.took_s * 1e3
        for offset, length, path in files.pieces(read.offset, read.length):
            parts = list(reads_of_disk(disk, offset, length))
            in_trace = None if named is None else all(_covers(named.get(part[0], []), *part[1:]) for part in parts)
            steps.append(
                Step(
                    at_ms,
                    took_ms,
                    offset,
                    length,
                    tuple(sorted({layer for layer, _, _ in parts})),
                    path,
                    read.process,
                    read.pid,
                    read.is_ahead,
                    in_trace,
                    _state(took_ms, in_trace, there_within_ms),
                )
            )
    return steps


def summary(steps: Sequence[Step], disk: Stack, trace: Trace | None = None) -> Summary:
    """Return the sums of a timeline."""
    read = unique(Trace.from_reads(part for step in steps for part in reads_of_disk(disk, step.offset, step.length)))
    ends = [step.at_ms + (step.took_ms or 0.0) for step in steps]
    waits = [(step.at_ms, step.at_ms + step.took_ms) for step in steps if _made_wait(step) and step.took_ms]
    left_out = None if trace is None else sum(end - begin for _, begin, end in difference(read, trace))
    too_much = None if trace is None else sum(end - begin for _, begin, end in difference(trace, read))
    return Summary(
        reads=len({(step.at_ms, step.pid, step.took_ms) for step in steps}),
        size=sum(step.length for step in steps),
        processes=len({step.process for step in steps}),
        files=len({step.path for step in steps} - {None}),
        span_ms=max(ends, default=0.0),
        waited_ms=_length(waits),
        stored_size=_stored_size(read, disk),
        coverage=None if left_out is None or not read.size else 1 - left_out / read.size,
        over_read=None if too_much is None or trace is None or not trace.size else too_much / unique(trace).size,
    )


def by_kind(steps: Sequence[Step]) -> dict[str, Share]:
    """Return the shares of the kinds of reads: ``metadata``, ``loader``, ``libraries`` and ``application``.

    Reads of several kinds may wait at the same time, so the waiting times may add up to more than the whole.
    """
    found: dict[str, list[Step]] = {kind: [] for kind in KINDS}
    for step in steps:
        found[kind_of(step.path)].append(step)
    return {
        kind: Share(
            len(of_kind),
            sum(step.length for step in of_kind),
            _length((step.at_ms, step.at_ms + step.took_ms) for step in of_kind if _made_wait(step) and step.took_ms),
        )
        for kind, of_kind in found.items()
    }


def kind_of(path: bytes | None) -> str:
    """Return the kind of a file by its name: one of :data:`KINDS`."""
    if path is None:
        return "metadata"
    name = path.rpartition(b"/")[2]
    if name.startswith((b"ld-linux", b"ld-musl", b"ld.so.", b"ld64.so")):
        return "loader"
    return "libraries" if name.endswith(b".so") or b".so." in name else "application"


def frame(steps: Iterable[Step]) -> pd.DataFrame:
    """Return a timeline as a table, one row a step; paths as text. Needs the lab extra (LabExtraError)."""
    pandas = pandas_or_error()
    rows = [as_dict(step) for step in steps]
    table: pd.DataFrame = pandas.DataFrame(rows, columns=list(Step.__dataclass_fields__))
    return table


def as_dict(step: Step) -> dict[str, Any]:
    """Return a step as a JSON object."""
    path = None if step.path is None else step.path.decode(errors="backslashreplace") or "/"
    return asdict(step) | {"path": path, "layers": list(step.layers)}


class _Files:
    # Without a readable file system, every range belongs to no file.
    def __init__(self, disk: Stack) -> None:
        self._places: FilePlaces | None = None
        try:
            self._places = FilePlaces(disk)
        except FormatError as error:
            log.warning("files are not told: %s", error)

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, bytes | None]]:
        if self._places is None:
            yield offset, length, None
        else:
            yield from self._places.pieces([(offset // SECTOR, -(-(offset + length) // SECTOR))])


def _state(took_ms: float | None, in_trace: bool | None, there_within_ms: float) -> str:
    if took_ms is None:
        return "untold"
    if took_ms <= there_within_ms:
        return "prefetched" if in_trace else "there"
    if in_trace is None:
        return "waited"
    return "late" if in_trace else "missed"


def _made_wait(step: Step) -> bool:
    return step.state in ("waited", "late", "missed")


# Returns the length of the union of intervals.
def _length(intervals: Iterable[tuple[float, float]]) -> float:
    total = until = 0.0
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _covers(ranges: list[tuple[int, int]], offset: int, length: int) -> bool:
    at = bisect_left(ranges, (offset + 1,)) - 1
    return at >= 0 and ranges[at][1] >= offset + length


def _stored_size(read: Trace, disk: Stack) -> int:
    stored: dict[Blob, list[tuple[int, int]]] = defaultdict(list)
    for layer, ranges in coverage(read).items():
        for begin, end in ranges:
            for part, first, stop in parts_of(disk.layers[layer].data, begin, end):
                *_, file = chain(part)
                stored[file].append(range_in(file, part, first, stop))
    return round(sum(_length(ranges) for ranges in stored.values()))
