"""Lines of several tools, the reads they tell of, and anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.contrib.traces_extra.blockevents import BlockEvent, device_of, parse, reads_of
from obdlab.errors import FormatError

TRACEFS = """\
# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
              dd-28663   [001] ..... 13017.806643: block_bio_queue: 7,0 RS 0 + 128 [dd]
              dd-28663   [001] ..... 13017.806650: block_rq_issue: 7,0 RS 65536 () 0 + 128 be,0,4 [dd]
     ksoftirqd/1-22      [001] ..s.. 13017.808448: block_rq_complete: 7,0 RS () 0 + 128 be,0,4 [0]
    my-tool 2-28664   [000] ..... 13017.810000: block_bio_queue: 7,0 RA 4096 + 8 [my-tool 2]
     kworker/0:1-9       [000] ..... 13017.810100: block_rq_issue: 7,0 RA 4096 () 4096 + 8 none,0,0 [kworker/0:1]
          <idle>-0       [000] d.h1. 13017.810500: block_rq_complete: 7,0 RA () 4096 + 8 none,0,0 [0]
              dd-28663   [001] ..... 13017.811000: block_rq_issue: 7,0 WS 4096 () 64 + 8 [dd]
"""
TRACE_CMD = """\
cpus=2
              dd-28663 [001] 13017.806650: block_rq_issue:       7,0 RS 65536 () 0 + 128 [dd]
          <idle>-0     [001] 13017.808448: block_rq_complete:    7,0 RS () 0 + 128 [0]
"""
PERF = """\
              dd   28663 [001] 13017.806650:    block:block_rq_issue: 7,0 RS 65536 () 0 + 128 none,0,0 [dd]
            swapper      0 [001] 13017.808448: block:block_rq_complete: 7,0 RS () 0 + 128 none,0,0 [0]
"""
BLKPARSE = """\
  7,0    1        1 13017.806643000 28663  Q  RS 0 + 128 [dd]
  7,0    1        2 13017.806644000 28663  G  RS 0 + 128 [dd]
  7,0    1        3 13017.806650000 28663  D  RS 0 + 128 [dd]
  7,0    1        4 13017.808448000    22  C  RS 0 + 128 [0]
CPU1 (7,0):
 Reads Queued:           1,       64KiB
"""


@pytest.mark.parametrize("text", [TRACEFS, TRACE_CMD, PERF, BLKPARSE])
def test_the_first_read_is_the_same_in_every_form(text: str) -> None:
    events = parse(text.splitlines())
    assert device_of(events) == (7, 0)
    read = reads_of(events, (7, 0))[0]
    assert (read.offset, read.length, read.process, read.pid, read.is_ahead) == (0, 65536, "dd", 28663, False)
    assert read.took_s == pytest.approx(0.001798)
    assert read.at_s == 13017.806650


def test_who_has_queued_it_is_who_reads() -> None:
    reads = reads_of(parse(TRACEFS.splitlines()), (7, 0))
    assert [(read.process, read.offset, read.length, read.is_ahead) for read in reads] == [
        ("dd", 0, 65536, False),
        ("my-tool 2", 4096 * 512, 4096, True),
    ]


def event(at_s: float, action: str, sector: int, count: int, *, minor: int = 0, flags: str = "R") -> BlockEvent:
    return BlockEvent(at_s, (7, minor), action, flags, sector, count, "x", 1)


def test_a_request_completed_in_parts_took_until_the_last() -> None:
    events = [
        event(1, "D", 8, 16),
        event(2, "C", 8, 8),
        event(3, "D", 8, 8),
        event(4, "C", 16, 8),
        event(6, "C", 8, 8),
    ]
    assert [read.took_s for read in reads_of(events, (7, 0))] == [3, 3]


def test_what_is_not_told_stays_open() -> None:
    events = [event(1, "C", 0, 8), event(2, "Q", 8, 8), event(3, "Q", 16, 0)]
    (read,) = reads_of(events, (7, 0))
    assert (read.at_s, read.took_s, read.offset) == (2, None, 4096)


def test_several_devices_are_told_apart() -> None:
    events = [event(1, "D", 0, 8), event(2, "D", 0, 8, minor=1), event(3, "D", 0, 8, minor=1)]
    with pytest.raises(FormatError, match=r"7:1 \(2 events\), 7:0 \(1 events\)"):
        device_of(events)
    assert len(reads_of(events, (7, 1))) == 2
    with pytest.raises(FormatError, match="none"):
        device_of([event(1, "D", 0, 8, flags="W"), event(2, "D", 0, 8, flags="ZR")])


@pytest.mark.parametrize(
    "text", ["", "# nothing\n\n", "Trace started at Thu Jan  1 00:00:00 1970\n", "7,0 R 1 + 2\n"]
)
def test_files_without_events_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="no block events"):
        parse(text.splitlines())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# comment\n\n  first line \nsecond\n", "'first line'"),
        ("", "nothing"),
        ("# only\n", "nothing"),
        ("\0\1\n", "binary"),
    ],
)
def test_the_error_shows_the_first_line_that_is_no_event(text: str, shown: str) -> None:
    with pytest.raises(FormatError, match=shown):
        parse(text.splitlines())


def test_long_lines_are_not_looked_at() -> None:
    lines = TRACEFS.splitlines()
    assert len(parse([*lines, " " * 5000 + lines[2], "-" * 1_000_000])) == len(parse(lines))


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=80) | st.sampled_from(TRACEFS.splitlines())))
def test_anything_is_events_or_refused(lines: list[str]) -> None:
    try:
        events = parse(lines)
    except FormatError:
        return
    for read in reads_of(events, events[0].device):
        assert read.offset >= 0
        assert read.length > 0


@given(
    st.integers(0, 2**40),
    st.integers(1, 2**20),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=15),
)
def test_numbers_and_names_come_through(sector: int, count: int, name: str) -> None:
    line = f" {name}-7 [000] ..... 1.000001: block_rq_issue: 259,3 RA 1 () {sector} + {count} none,0,0 [{name}]"
    assert parse([line]) == [BlockEvent(1.000001, (259, 3), "D", "RA", sector, count, name, 7)]


# Patterns that try every way to share a row of blanks would take longer than any test may.
def test_rows_of_blanks_are_no_events() -> None:
    hostile = [" " * 1023, "a" + " " * 1022, "a " * 511, "a-1 " * 255, "a-1 [0] " + "x " * 500, "7,0 " * 255]
    with pytest.raises(FormatError):
        parse(hostile * 1000)
