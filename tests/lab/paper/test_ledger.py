"""The ledger to the letter, and the selection of the rows that it rests on."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.lab.paper import ledger
from obdlab.lab.paper.claims import CLAIMS
from obdlab.lab.paper.questions import FIO, INDEX, START
from obdlab.lab.paper.results import Results, busy, estimate, launch_s, ratio, samples
from obdlab.lab.paper.verdicts import Verdict
from obdlab.lab.run.rows import Row, RowStore
from obdlab.lab.run.spec import Spec
from obdlab.lab.run.statistics import Estimate
from tests.lab.paper.rows import Given, start_rows, store_grid, store_starts

TOTALS = {("overlayfs", "cold"): 10.0, ("obdlab", "cold"): 2.5}


def _entries(root: Path) -> list[ledger.Entry]:
    (root / "random_read").mkdir()
    (root / "random_read" / "not_run.txt").write_text("  fio: not installed\n")
    return ledger.ledger(Given(root, {"start": start_rows(TOTALS)}))


def test_a_claim_as_text_takes_three_lines_and_two_without_evidence(tmp_path: Path) -> None:
    entries = [e for e in _entries(tmp_path) if e.claim.key in {"cold-start", "hot-layer", "read-depth-1"}]
    assert ledger.as_text(entries) == [
        "Fig 14  REPRODUCED         A cold start is much faster than pulling and unpacking first.",
        "                           paper: 2.15 s against 11.06 s (0.19)",
        (
            "                           here:  obdlab against overlayfs, cold, native disk: 0.25 [0.24, 0.26] "
            "(paper: 0.19) (fair: 3 samples, no A/A)"
        ),
        "–       NOT MEASURED       (obdlab's own) A hot layer does the same by one request.",
        "                           paper: not in the paper",
        "Fig 22  NOT RUNNABLE HERE  At queue depth 1 the device is as fast as LVM.",
        "                           paper: equal",
        "                           here:  fio: not installed",
        "3 claims: 1 reproduced, 1 not measured, 1 not runnable here",
    ]
    assert ledger.as_text(entries[:1] * 2)[-1] == "2 claims: 2 reproduced"


def test_a_claim_as_values_for_programs(tmp_path: Path) -> None:
    facts = {entry.claim.key: entry.facts() for entry in _entries(tmp_path)}
    assert list(facts) == [claim.key for claim in CLAIMS]
    assert facts["cold-start"] == {
        "key": "cold-start",
        "figure": "Fig 14",
        "claim": "A cold start is much faster than pulling and unpacking first.",
        "paper": "2.15 s against 11.06 s (0.19)",
        "measured here": "obdlab against overlayfs, cold, native disk: 0.25 [0.24, 0.26] (paper: 0.19)",
        "verdict": "reproduced",
        "confidence": "fair: 3 samples, no A/A",
        "experiments": ["start"],
        "rows": 6,
    }
    missing = facts["read-depth-1"]
    assert (missing["measured here"], missing["verdict"]) == ("fio: not installed", "not runnable here")
    assert (missing["experiments"], missing["rows"], missing["confidence"]) == (["random_read"], 0, "")


def test_a_reason_counts_only_for_a_claim_without_rows(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "not_run.txt").write_text("no containerd")
    for total_s, verdict in ((2.5, Verdict.REPRODUCED), (8.0, Verdict.SHAPE_ONLY), (20.0, Verdict.NOT_REPRODUCED)):
        rows = start_rows({**TOTALS, ("obdlab", "cold"): total_s})
        found = {entry.claim.key: entry.outcome for entry in ledger.ledger(Given(tmp_path, {"start": rows}))}
        assert found["cold-start"].verdict is verdict
    assert (found["trace"].verdict, found["trace"].because) == (Verdict.NOT_RUNNABLE, "no containerd")
    # Its rows are those of another experiment, which was not tried.
    assert found["cold-start-p2p"].verdict is Verdict.NOT_MEASURED


def test_the_ledger_of_one_question(tmp_path: Path) -> None:
    entries = ledger.ledger(Results(tmp_path), "scan_tar")
    assert [entry.claim.key for entry in entries] == ["tar-fast", "tar-slow"]


def test_the_table_of_a_page(tmp_path: Path) -> None:
    entries = [e for e in _entries(tmp_path) if e.claim.key in {"cold-start", "read-depth-1"}]
    plain, linked = ledger.as_html(entries), ledger.as_html(entries, lambda entry: f"<i>{entry.claim.key}</i>")
    assert plain.count("<th ") == 6
    assert linked.count("<th ") == 7
    assert linked.count("<i>") == 2
    assert [plain.count(tag) for tag in ("<td ", "<tr", "</tr>")] == [12, 3, 3]
    style = "text-align:left;color:{};font-weight:600;white-space:nowrap"
    assert f"<td style='{style.format('#2f7d4f')}'>reproduced</td>" in plain
    assert f"<td style='{style.format('#666666')}'>not runnable here</td>" in plain
    # Every verdict on something measured has a colour of its own.
    assert len(set(ledger.COLOURS.values())) == len(ledger.COLOURS) == 4


def test_rows_are_the_good_ones_of_the_last_run_with_these_values(tmp_path: Path) -> None:
    spec = Spec.from_values(
        {"name": "start", "images": ["redis"], "snapshotters": ["overlayfs", "obdlab"], "repeats": 2}
    )
    rows = [row for row in start_rows(TOTALS, 2) if row["disk"] == "native"]
    rows[1]["error"] = "no answer"
    directory = store_starts(tmp_path / "start", spec, rows)
    results = Results(tmp_path)
    found = results.rows(START)
    assert sorted((row["arm"], row["repeat"]) for row in found) == [("obdlab", 0), ("obdlab", 1), ("overlayfs", 0)]
    assert len(results.all_rows(START)) == 4
    assert [row["repeat"] for row in results.rows(START, arm="obdlab", repeat=1)] == [1]
    assert results.rows(START, arm="obdlab", nothing=1) == []
    # A value that a row lacks is None.
    assert len(results.rows(START, nothing=None)) == 3
    assert results.rows(FIO) == results.all_rows(FIO) == results.environments(FIO) == []
    assert results.why_not(FIO) == ""
    # Environments are those of the good rows alone.
    assert results.environments(START) == []
    known = RowStore(directory).add_environment({"kernel": "6.18"})
    RowStore(directory).add_environment({"kernel": "5.4"})
    for row in results.rows(START)[:2]:
        row["environment"] = known
    assert results.environments(START) == [{"id": known, "kernel": "6.18"}]


def test_a_second_baseline_is_no_point_of_an_axis_of_numbers(tmp_path: Path) -> None:
    axes = {"segments": [1000, 4500], "layers": [1]}
    spec = Spec.from_values({"name": "index", "kind": "index", "axes": axes, "repeats": 2, "a_a": True})
    store_grid(tmp_path / "index", spec, {})
    results = Results(tmp_path)
    assert len(results.all_rows(INDEX)) == 6
    assert [row["segments"] for row in results.rows(INDEX, layers=1)].count(1000) == 2
    assert {row["segments"] for row in results.rows(INDEX)} == {1000, 4500}
    fio = Spec.from_values({"name": "random_read", "kind": "fio", "repeats": 1, "a_a": True})
    store_grid(tmp_path / "random_read", fio, {})
    assert {row["device"] for row in results.rows(FIO)} >= {"loop", "loop (A/A)"}


def test_numbers_of_rows() -> None:
    rows: list[Row] = [{"x": 1}, {"x": None}, {}, {"x": 0.0}, {"x": 5, "quiet": True}]
    assert samples(rows, "x") == [1.0, 0.0, 5.0]
    found = estimate(rows, "x")
    assert found is not None
    assert (found.median, found.count) == (1.0, 3)
    assert estimate(rows, "y") is None
    assert ratio([{"x": 1}], [{"x": 4}], "x") == Estimate(0.25, 0.25, 0.25, 1)
    assert ratio([], [{"x": 4}], "x") is None
    assert ratio([{"x": 1}], [{"y": 4}], "x") is None
    assert launch_s({"create_s": 1, "start_s": 0.25, "ready_s": 0.5, "pull_s": 8}) == pytest.approx(1.75)
    assert not busy(rows)
    assert busy([*rows, {"quiet": False}])
