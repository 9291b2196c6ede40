"""The share of a recorded start that another trace covers, and the time it saves by a model of reads on demand.

The model: a start reads what was recorded, in order. A read with bytes that are not there waits for one round trip
and receives the aligned extents that hold them. A trace is fetched ahead in one round trip, at the link's rate. So a
start takes ``requests x round trip + bytes / rate`` beyond the start of an image that is there. The *gain* of a trace
is the time that it takes off a start without one; *kept* is the share of the gain of the recording itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.formats.lsmt.layout import SECTOR
from obdlab.formats.trace import Trace
from obdlab.traces.replay import reads_of_disk
from obdlab.traces.sectors import sectors_of_reads
from obdlab.traces.sets import coverage, difference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obdlab.layers.stack import Stack

#: Bytes of a miss's extent, as the cache's default (``cache_extent``), but of uncompressed data.
EXTENT = 256 << 10


@dataclass(frozen=True, slots=True)
class Link:
    """A link to a registry; ``ratio`` is that of stored to uncompressed bytes of the image's layers."""

    rate_mbit: float
    rtt_ms: float
    ratio: float

    def seconds(self, requests: int, size: int) -> float:
        """Return the time for requests one after the other that receive ``size`` uncompressed bytes."""
        return requests * self.rtt_ms / 1e3 + size * self.ratio * 8 / (self.rate_mbit * 1e6)


@dataclass(frozen=True, slots=True)
class Fit:
    """Bytes are uncompressed and count once; ``requests`` and ``received`` are those of misses, by the model."""

    recorded: int
    suggested: int
    covered: int
    requests_without: int
    received_without: int
    requests_with: int
    received_with: int

    @property
    def over_read(self) -> float:
        """Bytes suggested for each byte recorded."""
        return self.suggested / self.recorded

    def kept(self, link: Link) -> float:
        """Return the share of the recording's gain; negative if the suggestion makes a start longer."""
        without = link.seconds(self.requests_without, self.received_without)
        own = link.seconds(1, self.recorded)
        suggested = link.seconds(1 + self.requests_with, self.suggested + self.received_with)
        return (without - suggested) / (without - own) if without > own else 0.0


def fit(recorded: Trace, suggested: Trace) -> Fit:
    """Compare a suggested trace with a recorded one of the same image. ``recorded`` must not be empty."""
    size, offered = _size(recorded), _size(suggested)
    missed = sum(end - begin for _, begin, end in difference(recorded, suggested))
    none = _misses(recorded, {})
    some = _misses(recorded, coverage(suggested))
    return Fit(size, offered, size - missed, *none, *some)


def _size(trace: Trace) -> int:
    return sum(end - begin for ranges in coverage(trace).values() for begin, end in ranges)


# Returns requests and bytes of the misses of a start that has the ranges ``held`` of each layer.
def _misses(recorded: Trace, held: Mapping[int, list[tuple[int, int]]]) -> tuple[int, int]:
    sectors = {
        (layer, sector)
        for layer, ranges in held.items()
        for begin, end in ranges
        for sector in range(-(-begin // SECTOR), end // SECTOR)
    }
    fetched: set[tuple[int, int]] = set()
    requests = received = 0
    for layer, offset, length in recorded.reads():
        missing = {
            sector * SECTOR // EXTENT
            for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR))
            if (layer, sector) not in sectors and (layer, sector * SECTOR // EXTENT) not in fetched
        }
        if missing:
            requests += 1
            received += EXTENT * len(missing)
            fetched |= {(layer, extent) for extent in missing}
    return requests, received


def data_of(trace: Trace, disk: Stack) -> Trace:
    """Return the reads of the disk's data in a trace: layers' headers and indexes are read by any start."""
    sectors = sectors_of_reads(trace.reads(), disk)
    return Trace.from_reads(
        read for begin, end in sectors for read in reads_of_disk(disk, begin * SECTOR, (end - begin) * SECTOR)
    )
