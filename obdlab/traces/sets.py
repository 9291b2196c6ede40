"""Traces as sets of bytes and as tables: merged, compared, reduced."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from obdlab.formats.trace import Trace
from obdlab.frames import pandas_or_error

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    import pandas as pd

    Ranges = list[tuple[int, int]]


def frame(trace: Trace) -> pd.DataFrame:
    """Return a trace as a table, one row per read in order: ``layer``, ``offset``, ``length``, ``end``, ``new``.

    ``new`` is the number of bytes that no earlier row has read. Needs the lab extra (LabExtraError).
    """
    pandas = pandas_or_error()
    reads = trace.reads()
    table: pd.DataFrame = pandas.DataFrame(reads, columns=["layer", "offset", "length"]).astype("int64")
    table["end"] = table["offset"] + table["length"]
    held: dict[int, Ranges] = defaultdict(list)
    table["new"] = [sum(end - begin for begin, end in _add(held[layer], at, at + size)) for layer, at, size in reads]
    return table


def from_frame(table: pd.DataFrame) -> Trace:
    """Return the trace of a table with the columns ``layer``, ``offset`` and ``length``."""
    columns = (table[name].astype("int64").tolist() for name in ("layer", "offset", "length"))
    return Trace.from_reads(zip(*columns, strict=True))


def summary(trace: Trace) -> dict[str, Any]:
    """Return ``reads``, ``size``, ``unique_size``, and the same with ``layer`` and ``end`` for each of ``layers``."""
    layers: dict[int, dict[str, int]] = {}
    for layer, offset, length in trace.reads():
        one = layers.setdefault(layer, {"layer": layer, "reads": 0, "size": 0, "unique_size": 0, "end": 0})
        one["reads"] += 1
        one["size"] += length
        one["end"] = max(one["end"], offset + length)
    for layer, ranges in coverage(trace).items():
        layers[layer]["unique_size"] = sum(end - begin for begin, end in ranges)
    total = {name: sum(one[name] for one in layers.values()) for name in ("reads", "size", "unique_size")}
    return total | {"layers": [layers[layer] for layer in sorted(layers)]}


def coverage(trace: Trace) -> dict[int, Ranges]:
    """Return the ranges [begin, end) of each layer that are read, sorted and joined."""
    held: dict[int, Ranges] = defaultdict(list)
    for layer, offset, length in trace.reads():
        held[layer].append((offset, offset + length))
    return {layer: _joined(ranges) for layer, ranges in held.items()}


def unique(trace: Trace) -> Trace:
    """Return the trace with every byte only once, at its first read."""
    held: dict[int, Ranges] = defaultdict(list)
    return Trace.from_reads(
        (layer, begin, end - begin)
        for layer, offset, length in trace.reads()
        for begin, end in _add(held[layer], offset, offset + length)
    )


def merge(traces: Sequence[Trace], *, least: int = 1) -> Trace:
    """Return a trace of the bytes that at least ``least`` of ``traces`` read: 1 is the union, all the intersection.

    Reads are interleaved by their relative position in their trace: an early read of any trace comes early.
    """
    wanted = _read_by(traces, least)
    reads = sorted(
        (number / max(1, len(trace)), turn, read)
        for turn, trace in enumerate(traces)
        for number, read in enumerate(trace.reads())
    )
    kept = (
        (layer, begin, end - begin)
        for _, _, (layer, offset, length) in reads
        for begin, end in _overlap(wanted.get(layer, []), offset, offset + length)
    )
    return unique(Trace.from_reads(kept))


def difference(one: Trace, other: Trace) -> list[tuple[int, int, int]]:
    """Return (layer, begin, end) of the ranges that ``one`` reads and ``other`` does not."""
    theirs = coverage(other)
    found = []
    for layer, ranges in sorted(coverage(one).items()):
        for begin, end in ranges:
            at = begin
            for first, last in _overlap(theirs.get(layer, []), begin, end):
                if at < first:
                    found.append((layer, at, first))
                at = last
            if at < end:
                found.append((layer, at, end))
    return found


def select(
    trace: Trace,
    *,
    layers: Collection[int] | None = None,
    sizes: Sequence[int] | None = None,
    first: int | None = None,
) -> Trace:
    """Return the reads of these ``layers`` that lie inside of layers of these ``sizes``; of them the ``first``."""
    reads = [
        (layer, offset, length)
        for layer, offset, length in trace.reads()
        if (layers is None or layer in layers)
        and (sizes is None or (layer < len(sizes) and 0 <= offset <= offset + length <= sizes[layer]))
    ]
    return Trace.from_reads(reads if first is None else reads[: max(0, first)])


def _read_by(traces: Sequence[Trace], least: int) -> dict[int, Ranges]:
    # Returns the ranges of each layer that at least `least` traces read, by sweeping over the edges of their ranges.
    edges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for trace in traces:
        for layer, ranges in coverage(trace).items():
            edges[layer] += [edge for begin, end in ranges for edge in ((begin, 1), (end, -1))]
    found = {}
    for layer, changes in edges.items():
        ranges, depth, since = [], 0, 0
        for at, change in sorted(changes, key=lambda edge: (edge[0], -edge[1])):
            depth += change
            if change > 0 and depth == least:
                since = at
            elif change < 0 and depth == least - 1 and since < at:
                ranges.append((since, at))
        found[layer] = _joined(ranges)
    return found


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: Ranges = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _overlap(ranges: Ranges, begin: int, end: int) -> Ranges:
    # Returns the parts of [begin, end) that lie in the sorted ranges.
    at = bisect_right(ranges, (begin,))
    at -= at > 0 and ranges[at - 1][1] > begin
    found = []
    while at < len(ranges) and ranges[at][0] < end:
        found.append((max(begin, ranges[at][0]), min(end, ranges[at][1])))
        at += 1
    return found


def _add(ranges: Ranges, begin: int, end: int) -> Ranges:
    # Adds [begin, end) to the sorted ranges, and returns the parts of it that were new.
    new, at = [], begin
    for first, last in _overlap(ranges, begin, end):
        if at < first:
            new.append((at, first))
        at = last
    if at < end:
        new.append((at, end))
    if new:
        low = bisect_right(ranges, (begin,))
        low -= low > 0 and ranges[low - 1][1] >= begin
        high = low
        while high < len(ranges) and ranges[high][0] <= end:
            begin, end = min(begin, ranges[high][0]), max(end, ranges[high][1])
            high += 1
        ranges[low:high] = [(begin, end)]
    return new
