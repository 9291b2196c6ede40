"""The kind of emulated swarms: what it declares, and a small one with real agents and a real registry."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from obdlab.lab.kinds.emulation import LABEL, Swarm
from obdlab.lab.kinds.simulation import workload_of
from obdlab.lab.paths import LabPaths
from obdlab.lab.run.declaration import load
from obdlab.lab.run.experiment import Experiment
from obdlab.lab.run.plan import plan_run
from obdlab.lab.run.spec import Spec, SpecError
from obdlab.lab.testbed.startreplay import Start
from obdlab.lab.workbench import folder

#: Half a second of a program's time and a quarter of a megabyte, over links that do not matter.
OPTIONS = {"working_set_mb": 0.25, "local_ms": 100.0, "slower": 2.0, "up_mbit": 200.0, "origin_mbit": 200.0}


def spec(**values: Any) -> Spec:
    about = {"name": "swarm", "kind": "swarm", "repeats": 1, "quiet_wait_s": 0, "load_limit": 1000.0}
    return Spec.from_values({**about, "options": OPTIONS, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"axes": {"topology": ["none"]}}, "axes.topology: unknown"),
        ({"axes": {"caches": ["warm"]}}, "axes.caches: unknown"),
        ({"axes": {"hosts": [0]}}, "axes.hosts: wanted 1 to 64"),
        ({"options": {"slower": 0.0}}, "slower"),
        ({"options": {"origin_rtt_ms": -1.0}}, "origin_rtt_ms"),
    ],
)
def test_a_declaration_is_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        spec(**values)


@pytest.mark.parametrize("path", sorted(folder("experiments").glob("swarm*.toml")), ids=lambda path: path.stem)
def test_declarations_say_that_they_are_emulated_and_have_a_quick_mode(path: Path) -> None:
    whole, quick = load(path), load(path, quick=True)
    assert whole.description.startswith("Emulated: ")
    assert len(quick.cells()) < len(whole.cells())
    assert plan_run(quick, quick.cells(), LabPaths()).seconds < 900
    assert {whole.columns(cell)["label"] for cell in whole.cells()} == {LABEL}


def test_the_blobs_hold_each_block_once() -> None:
    start = Start(workload_of({**Swarm.options, **OPTIONS}), "seed")
    assert sum(len(layer.data) for layer in start.layers) == start.workload.size
    places = sorted((block.layer, block.begin, block.end) for block in start.blocks)
    for before, after in pairwise(places):
        assert after[1] == (before[2] if before[0] == after[0] else 0)
    assert [layer.digest for layer in start.layers] == [
        layer.digest for layer in Start(start.workload, "seed").layers
    ]


@pytest.mark.kernel
@pytest.mark.registry
@pytest.mark.parametrize(
    ("axes", "sets"),
    [
        ({"topology": ["rendezvous", "direct"], "hosts": [3]}, {"rendezvous": (1, 2), "direct": (3, 0)}),
        ({"topology": ["rooted"], "hosts": [1], "caches": ["warm root"]}, {"rooted": (0, 1)}),
    ],
)
def test_a_small_swarm(tmp_path: Path, axes: dict[str, Any], sets: dict[str, tuple[int, int]]) -> None:
    experiment = Experiment(spec(axes=axes), tmp_path / "swarm")
    assert experiment.run() == len(sets)
    assert experiment.run() == 0
    rows = {row["topology"]: row for row in experiment.rows()}
    assert not [row["error"] for row in rows.values() if row.get("error")]
    for topology, (origin, peer) in sets.items():
        row = rows[topology]
        # Hash trees, and the ends of 16 KiB units, come on top: a quarter of a megabyte is little.
        assert origin <= row["origin_sets"] <= origin + 0.3, row
        assert peer <= row["peer_sets"] <= peer + 0.3, row
        # The program's own time is twice as long.
        assert 2 * 0.1 < row["first_s"] <= row["median_s"] <= row["slowest_s"]
        assert (row["wrong_units"], row["label"]) == (0, LABEL)
        assert 0 < row["own_cpu_share"] <= row["cpu_share"] + 0.1
    assert any(next(iter(sets)) in line for line in experiment.report())
