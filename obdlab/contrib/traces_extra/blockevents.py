"""Text lines of the kernel's block events: which process read which range of which device, and for how long.

Two forms are read, each line by itself. One is the form of tracefs, ``trace-cmd report``, ``perf script``, and of
bpftrace programs that imitate it::

    cat-4711  [001] .....  100.000123: block_rq_issue: 7,0 RA 131072 () 2048 + 256 none,0,0 [cat]

with ``block_bio_queue`` (queued), ``block_rq_issue`` (given to the driver) and ``block_rq_complete``. The other is
the form of blkparse(1) with the actions Q, D and C::

    7,0    1       11     0.000123456  4711  D  RA 2048 + 256 [cat]

Sectors have 512 bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable

SECTOR = 512
#: Longer lines are not events; they are skipped unparsed.
MAX_LINE = 1024
#: More events than a start of hours makes; a longer list is refused rather than held in memory.
MAX_EVENTS = 1 << 22
_ACTIONS = {"block_bio_queue": "Q", "block_rq_issue": "D", "block_rq_complete": "C"}
_WHAT = r"(?P<sector>\d{1,18}) \+ (?P<count>\d{1,10})"
_TRACEFS = re.compile(
    r"(?P<task>\S.{0,31}?)[-\s]\s*(?P<pid>\d{1,10})\s+(?:\(.{0,20}?\)\s+)?\[\d+\]\s+(?:\S+\s+)?(?P<at>\d{1,12}\.\d{1,9}):\s+"
    r"(?:block:)?(?P<action>block_bio_queue|block_rq_issue|block_rq_complete):\s+"
    r"(?P<major>\d{1,10}),(?P<minor>\d{1,10}) (?P<flags>[A-Z]{1,10}) (?:\d+ )?(?:\([^)]*\) )?" + _WHAT +
    r"(?: [\w,]+)? \[(?P<process>.{0,32})\]",
    re.ASCII,
)  # fmt: skip
_BLKPARSE = re.compile(
    r"(?P<major>\d{1,10}),(?P<minor>\d{1,10})\s+\d+\s+\d+\s+(?P<at>\d{1,12}\.\d{1,9})\s+(?P<pid>\d{1,10})\s+"
    r"(?P<action>[QDC])\s+(?P<flags>[A-Z]{1,10})\s+" + _WHAT + r"(?: \[(?P<process>.{0,32})\])?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """A state change of a request: ``action`` Q (queued), D (given to the driver) or C (completed)."""

    at_s: float
    device: tuple[int, int]
    action: str
    #: As the kernel writes them: R first for reads, A for readahead.
    flags: str
    sector: int
    count: int
    process: str
    pid: int

    @property
    def is_read(self) -> bool:
        """True for a read. Operations like "ZR" (reset a zone) are not reads."""
        return self.flags.startswith("R")


@dataclass(frozen=True, slots=True)
class DiskRead:
    """One request of the kernel for ``[offset, offset + length)`` of a device."""

    at_s: float
    #: Time until the completion event; None without one.
    took_s: float | None
    offset: int
    length: int
    process: str
    pid: int
    #: The kernel's readahead asked for it, no process yet.
    is_ahead: bool


# The "line" of a binary file must not be printed.
def _shown(line: str) -> str:
    if not line:
        return "nothing"
    return repr(line) if line.replace("\t", " ").isprintable() and "\ufffd" not in line else "binary data"


def parse(lines: Iterable[str], *, name: str = "events") -> list[BlockEvent]:
    """Return the block events among the lines in order of time; other lines are left out.

    Raises FormatError for no event, or for more than four million.
    """
    events = []
    first_odd = ""
    for line in lines:
        event = _event(line) if len(line) <= MAX_LINE else None
        if event is not None:
            events.append(event)
            if len(events) > MAX_EVENTS:
                raise FormatError("too many block events", blob=name, wanted=f"at most {MAX_EVENTS}")
        elif not first_odd and line.strip() and not line.startswith("#"):
            first_odd = line.strip()[:120]
    if not events:
        raise FormatError(
            "no block events in it",
            blob=name,
            got=_shown(first_odd),
            wanted="lines of tracefs, trace-cmd, perf script or blkparse",
        )
    return sorted(events, key=lambda event: event.at_s)


def _event(line: str) -> BlockEvent | None:
    line = line.strip()  # not by the patterns, which would try every way to share a row of blanks
    found = _TRACEFS.fullmatch(line) or _BLKPARSE.fullmatch(line)
    if found is None:
        return None
    action = found["action"]
    return BlockEvent(
        float(found["at"]),
        (int(found["major"]), int(found["minor"])),
        _ACTIONS.get(action, action),
        found["flags"],
        int(found["sector"]),
        int(found["count"]),
        found["process"] or "",
        int(found["pid"]),
    )


def device_of(events: Iterable[BlockEvent], *, name: str = "events") -> tuple[int, int]:
    """Return (major, minor) of the one device in the events. Raises FormatError if there are several."""
    found = Counter(event.device for event in events if event.is_read)
    if len(found) != 1:
        several = ", ".join(f"{major}:{minor} ({count} events)" for (major, minor), count in found.most_common(5))
        raise FormatError("reads of one device are wanted", blob=name, got=several or "none", wanted="one")
    (device,) = found
    return device


def reads_of(events: Iterable[BlockEvent], device: tuple[int, int]) -> list[DiskRead]:
    """Return the reads of a device (major, minor) in the order they were given to its driver.

    If the events have no action D, the order of queueing is used.
    """
    mine = [event for event in events if event.device == device and event.is_read and event.count]
    began = "D" if any(event.action == "D" for event in mine) else "Q"
    asked_by = {event.sector: event for event in mine if event.action == "Q"}
    begun = [event for event in mine if event.action == began]
    ended = _ends(event for event in mine if event.action in (began, "C"))
    return [
        _read(event, asked_by.get(event.sector, event), took_s) for event, took_s in zip(begun, ended, strict=True)
    ]


# The reader is the process that queued the request: the kernel may pass it to the driver in a thread of its own.
def _read(event: BlockEvent, asked: BlockEvent, took_s: float | None) -> DiskRead:
    return DiskRead(
        event.at_s,
        took_s,
        event.sector * SECTOR,
        event.count * SECTOR,
        asked.process,
        asked.pid,
        "A" in event.flags,
    )


# How long each begun request took. A request may be completed in parts, from its start on.
def _ends(events: Iterable[BlockEvent]) -> list[float | None]:
    took: list[float | None] = []
    under_way: dict[int, tuple[int, int, float]] = {}
    for event in events:
        if event.action != "C":
            under_way[event.sector] = (len(took), event.sector + event.count, event.at_s)
            took.append(None)
        elif (known := under_way.pop(event.sector, None)) is not None:
            number, end, since = known
            rest = event.sector + event.count
            if rest < end:
                under_way[rest] = known
            else:
                took[number] = event.at_s - since
    return took
