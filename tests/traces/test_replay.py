"""Planning the replay of traces and lists: as much as is asked for, and no more."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obdlab.formats.trace import Trace
from obdlab.traces import replay
from obdlab.traces.replay import reads_in, start_replay
from tests.cache.origin import UNIT, Origin, open_cached


def test_ranges_are_found_as_they_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long trace whose records are each as long as the layer would take much memory at once."""
    found, range_in = [], replay.range_in

    def counted(*arguments: Any) -> tuple[int, int]:
        found.append(range_in(*arguments))
        return found[-1]

    trace = Trace.from_reads([(0, 0, UNIT)] * 1000).to_bytes()
    finds: list[Any] = []
    with open_cached(tmp_path, Origin()) as blob:
        disk: Any = SimpleNamespace(layers=[SimpleNamespace(data=blob)])
        monkeypatch.setattr(replay, "range_in", counted)
        monkeypatch.setattr(
            replay, "Prefetch", lambda name, blobs, find: finds.append(find) or SimpleNamespace(start=lambda: None)
        )
        start_replay("trace", lambda: trace, disk)
        ranges = iter(finds[0]())
        assert next(ranges) == (0, 0, UNIT)
        assert len(found) == 1
        assert sum(1 for _ in ranges) == 999


def test_a_list_has_no_more_reads_than_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_listed_reads", lambda listed, disk, name: repeat((0, 0, 1), 100))
    monkeypatch.setattr(replay, "MOST_READS", 7)
    nothing: Any = None
    assert reads_in(b"/bin/sh\n", nothing, name="list") == [(0, 0, 1)] * 7
