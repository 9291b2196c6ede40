"""Recorded starts as workloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from obdlab.peers.simulator import SimulationError, Step, Workload

RECORDED = Path(__file__).parents[3] / "experiments" / "measured" / "timeline" / "redis.json"


def read(at_ms: float, took_ms: float, offset: int, length: int, *layers: int) -> dict[str, Any]:
    return {"at_ms": at_ms, "took_ms": took_ms, "offset": offset, "length": length, "layers": list(layers)}


def timeline(*reads: dict[str, Any], stored: int = 50) -> dict[str, Any]:
    return {"summary": {"size": 100, "stored_size": stored}, "steps": list(reads)}


def test_reads_that_overlap_are_one_step_and_waiting_is_no_work() -> None:
    found = Workload.from_timeline(
        timeline(
            read(2, 10, 0, 100, 3),
            read(5, 2, 4096, 100, 3),  # during the first
            read(14, 1, 50, 100, 3),  # 2 ms later, of a block that is there
            read(20, 1, 8000, 1000, 3, 7),  # 5 ms later, over a border, of the uppermost layer
            read(30, 1, 0, 5000),  # of no layer
        ),
        4096,
    )
    assert found.steps == (Step(0.002, (0, 1)), Step(0.007, (2, 3)))
    assert found.sizes == (2048,) * 4
    assert found.layers == (0, 0, 1, 1)
    assert found.size == 8192
    assert found.think_s == pytest.approx(0.009)


def test_the_recorded_start_of_redis() -> None:
    found = Workload.from_timeline(json.loads(RECORDED.read_text()), 262_144)
    assert len(found.sizes) == len({block for step in found.steps for block in step.blocks})
    assert 10e6 < found.size < 16e6
    assert 0.05 < found.think_s < 0.2
    scaled = found.scaled(15_000_000)
    assert scaled.size == pytest.approx(15_000_000, rel=1e-3)
    assert scaled.steps == found.steps


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "not that of a start"),
        (timeline(), "wanted reads"),
        (timeline(read(0, 1, 0, 1, 0), stored=0), "stored share"),
        (timeline(read(0, 1, 0, 1)), "no read of any layer"),
        (timeline(read(0, 1, -1, 1, 0)), "a read of 1 bytes at -1"),
        (timeline(read(0, 1, 0, 2**60, 0)), "a read of"),
        ({"summary": {"size": 0, "stored_size": 0}, "steps": []}, "not that of a start"),
        (timeline({"at_ms": "x"}), "not that of a start"),
    ],
)
def test_a_document_of_another_form_is_refused(document: dict[str, Any], words: str) -> None:
    with pytest.raises(SimulationError, match=words):
        Workload.from_timeline(document, 4096)


def test_sizes_are_checked() -> None:
    with pytest.raises(SimulationError, match="block size"):
        Workload.from_timeline(timeline(read(0, 1, 0, 1, 0)), 512)
    with pytest.raises(SimulationError, match="working set"):
        Workload.even(10, 100).scaled(5)
