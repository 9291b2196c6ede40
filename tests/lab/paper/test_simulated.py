"""Claims over simulated rows: held, refuted, unclear; never the verdicts of measured ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.lab.paper import simulated
from obdlab.lab.paper.ledger import COLOURS
from obdlab.lab.paper.results import Results
from obdlab.lab.paper.verdicts import Outcome, Verdict
from obdlab.lab.run.rows import Row
from obdlab.peers.simulator.fitting import Fit, Prediction
from tests.lab.paper.rows import Given
from tests.lab.paper.rows import simulated as simulated_rows

CLAIMS = {claim.key: claim for claim in (*simulated.DADI, *simulated.FAASNET)}
Y, N, U = Verdict.SIMULATED, Verdict.SIMULATED_NOT, Verdict.UNCLEAR


def outcome(root: Path, key: str, rows: dict[str, list[Row]]) -> Outcome:
    return CLAIMS[key].check(Given(root, rows))


def given(run: str, key: str, value: float, **where: object) -> dict[str, list[Row]]:
    """Return rows that hold all claims, with one number changed in the rows with these values."""
    rows = simulated_rows()
    for row in rows[run]:
        if all(row[name] == wanted for name, wanted in where.items()):
            row[key] = value
    return rows


@pytest.mark.parametrize(
    ("key", "run", "number", "where", "values"),
    [
        ("large-scale", "scale", "all_ready_s", {"topology": "rooted", "caches": "cold"}, {3.99: Y, 4.0: N}),
        ("large-scale-gap", "scale", "median_s", {"topology": "rooted", "caches": "cold"}, {3.0: Y, 3.1: N, 0.5: Y}),
        ("hyper-scale", "hyper", "slowest_s", {"hosts": 100_000, "arity": 3}, {1.25: Y, 1.26: N, 0.5: Y}),
        ("faasnet-tree", "faasnet", "median_s", {"topology": "rooted", "hosts": 128}, {2.0: Y, 1.9: N, 4.1: N}),
        ("faasnet-on-demand", "faasnet", "median_s", {"topology": "direct", "hosts": 128}, {2.5: Y, 2.4: N, 11.0: N}),
        ("faasnet-spread", "faasnet", "spread_s", {"topology": "balanced", "hosts": 128}, {2.9: Y, 3.0: N}),
        ("faasnet-peak", "faasnet", "peak_sent_mb_s", {}, {112.5: Y, 113.0: N, 75.0: Y, 74.0: N}),
        ("faasnet-scale", "functions", "all_ready_s", {}, {8.3: Y, 8.4: N}),
        ("faasnet-bursts", "bursts", "recovered_s", {"topology": "direct"}, {2.0: Y, 1.9: N}),
    ],
)
def test_bounds_of_each_claim(
    tmp_path: Path, key: str, run: str, number: str, where: dict[str, object], values: dict[float, Verdict]
) -> None:
    assert CLAIMS[key].refuted
    for value, verdict in values.items():
        found = outcome(tmp_path, key, given(f"simulated_{run}", number, value, **where))
        assert found.verdict is verdict, value
        assert found.confidence == "simulated, not fitted to a swarm; 3 seeds"
        assert found.p is None
        assert found.rows >= 3
    assert CLAIMS[key].check(Results(tmp_path)).verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize(
    ("direct_s", "tree_s", "verdict", "words"),
    [
        (113.0, 28.0, Y, "recovery on demand after 113.0 s, by the tree after 28.0 s"),
        # Requests end 180 s after the burst begins: a recovery may have been sooner or later than twice the tree's.
        (179.99, 28.0, Y, "recovery on demand not within 180 s, by the tree after 28.0 s"),
        (179.99, 100.0, U, "recovery on demand not within 180 s, by the tree after 100.0 s"),
        (179.99, 179.99, U, "recovery on demand not within 180 s, by the tree not within 180 s"),
        (60.0, 179.99, N, "recovery on demand after 60.0 s, by the tree not within 180 s"),
        (178.5, 100.0, N, "recovery on demand after 178.5 s, by the tree after 100.0 s"),
    ],
)
def test_a_burst_without_recovery(
    tmp_path: Path, direct_s: float, tree_s: float, verdict: Verdict, words: str
) -> None:
    rows = given("simulated_bursts", "recovered_s", direct_s, topology="direct")
    for row in rows["simulated_bursts"]:
        if row["topology"] == "balanced":
            row["recovered_s"] = tree_s
    found = outcome(tmp_path, "faasnet-bursts", rows)
    assert (found.verdict, found.measured) == (verdict, words)


def test_one_bad_seed_refutes(tmp_path: Path) -> None:
    rows = simulated_rows()
    rows["simulated_scale"][0]["all_ready_s"] = 5.0
    assert (rows["simulated_scale"][0]["topology"], rows["simulated_scale"][0]["caches"]) == ("rooted", "cold")
    assert outcome(tmp_path, "large-scale", rows).verdict is N


def test_few_seeds_or_few_hosts_prove_nothing(tmp_path: Path) -> None:
    few = {run: [row for row in rows if row["repeat"] < 2] for run, rows in simulated_rows().items()}
    assert {outcome(tmp_path, key, few).verdict for key in CLAIMS} == {U}
    small = simulated_rows(simulated_hyper={"slowest_s": 1.0})
    for row in small["simulated_hyper"]:
        row["hosts"] = {1000: 1000, 100_000: 50_000}[row["hosts"]]
    assert outcome(tmp_path, "hyper-scale", small).verdict is U
    for row in small["simulated_hyper"]:
        row["slowest_s"] = row["hosts"]
    assert outcome(tmp_path, "hyper-scale", small).verdict is N


def test_simulated_verdicts_have_no_colour_of_measured_ones() -> None:
    assert not {Verdict.SIMULATED, Verdict.SIMULATED_NOT} & set(COLOURS)


def test_the_models_error_stands_beside_a_projection() -> None:
    assert simulated.basis(None) == "simulated, not fitted to a swarm"
    points = (
        (Prediction("rooted", 8, 1.0, 1.0),),
        (Prediction("rooted", 16, 1.0, 1.02), Prediction("rooted", 32, 1.0, 0.93)),
    )
    words = "simulated; the model, fitted to 8 emulated hosts, is wrong by at most 7% at 16 and 32"
    assert simulated.basis(Fit({}, *points)) == words
    assert simulated.basis(Fit({}, points[0], ())) == "simulated, not fitted to a swarm"
