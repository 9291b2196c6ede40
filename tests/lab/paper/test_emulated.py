"""Claims over emulated rows: the limits of each, and rows that say more of the machine than of links."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obdlab.lab.paper import emulated
from obdlab.lab.paper.results import Results
from obdlab.lab.paper.verdicts import Outcome, Verdict
from obdlab.lab.run.rows import Row
from tests.lab.paper.rows import Given
from tests.lab.paper.rows import swarm as swarm_rows

R, N, U, S = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.UNCLEAR, Verdict.SHAPE_ONLY
CLAIMS = {claim.key: claim for claim in (emulated.FROM_PEERS, *emulated.BATCH)}


def outcome(root: Path, key: str, change: Callable[[Row], dict[str, Any]] = lambda row: {}) -> Outcome:
    """Return the outcome over rows that hold all claims, with ``change`` made to each."""
    rows = {name: [{**row, **change(row)} for row in found] for name, found in swarm_rows().items()}
    return CLAIMS[key].check(Given(root, rows))


def rising(share: float, topology: str = "rendezvous") -> Callable[[Row], dict[str, Any]]:
    """Starts that take so much more, as a share of one start, with each doubling."""

    def change(row: Row) -> dict[str, Any]:
        if row["topology"] != topology:
            return {}
        noise = 0.001 * (row["repeat"] - 1)
        return {"median_s": 10 * (1 + noise + share * math.log2(row["hosts"]))}

    return change


def test_rows_like_the_papers_hold_all_claims_and_none_measured_is_none_said(tmp_path: Path) -> None:
    for key, claim in CLAIMS.items():
        found = outcome(tmp_path, key)
        assert found.verdict is R, (key, found)
        assert found.confidence.endswith("hosts and links emulated")
        assert claim.refuted
        assert claim.check(Results(tmp_path)).verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.0, R), (0.047, R), (-0.047, R), (0.0499, U), (0.053, N), (-0.053, N)]
)
def test_how_flat_starts_must_be(tmp_path: Path, share: float, verdict: Verdict) -> None:
    found = outcome(tmp_path, "batch-start", rising(share))
    assert found.verdict is verdict
    assert f"a doubling adds {share:+.1%} [" in found.measured
    assert "; without peers +40.0% [" in found.measured


def test_a_control_that_does_not_rise_proves_nothing(tmp_path: Path) -> None:
    assert outcome(tmp_path, "batch-start", rising(0.04, "direct")).verdict is U
    assert outcome(tmp_path, "batch-start", rising(0.06, "direct")).verdict is R


def test_numbers_of_hosts_with_a_row_of_busy_processors_decide_nothing(tmp_path: Path) -> None:
    def busy(row: Row) -> dict[str, Any]:
        is_one = (row["hosts"], row["repeat"], row["topology"]) == (32, 0, "rendezvous")
        return {"links_decide": False, "median_s": 99.0, "slowest_s": 99.0} if is_one else {}

    found = outcome(tmp_path, "batch-start", busy)
    # 16 hosts do not prove the claim on 32, and may refute it.
    assert found.verdict is U
    assert found.measured.startswith("from 1 to 16 hosts")
    assert "3 rows of numbers of hosts with processors busier than 70% left out" in found.measured
    assert outcome(tmp_path, "batch-slowest", busy).verdict is U
    for key in ("batch-start", "batch-slowest"):
        found = outcome(tmp_path, key, lambda row: {"links_decide": False})
        assert (found.verdict, found.rows) == (U, 18)
        assert found.measured.startswith("the processors decided, not the links: 18 rows")
    found = outcome(tmp_path, "cold-start-p2p", lambda row: {"links_decide": row["repeat"] > 0})
    assert (found.verdict, found.rows) == (U, 6)
    # Bytes do not depend on processors.
    assert outcome(tmp_path, "batch-origin", lambda row: {"links_decide": False}).verdict is R
    steep = outcome(tmp_path, "batch-start", lambda row: {**rising(0.2)(row), "links_decide": row["hosts"] < 32})
    assert steep.verdict is N


@pytest.mark.parametrize(("sets", "verdict"), [(1.2, R), (1.201, N)])
def test_one_row_with_too_many_bytes_of_the_registry_refutes(tmp_path: Path, sets: float, verdict: Verdict) -> None:
    def change(row: Row) -> dict[str, Any]:
        is_one = (row["hosts"], row["repeat"], row["topology"]) == (4, 1, "rendezvous")
        return {"origin_sets": sets} if is_one else {}

    found = outcome(tmp_path, "batch-origin", change)
    assert found.verdict is verdict
    assert "without peers 32.0" in found.measured


@pytest.mark.parametrize(("ratio", "verdict"), [(1.24, R), (1.26, N)])
def test_how_slow_the_slowest_may_be(tmp_path: Path, ratio: float, verdict: Verdict) -> None:
    def change(row: Row) -> dict[str, Any]:
        return {"slowest_s": 10.0 * (ratio if row["hosts"] == 32 else 1.0)}

    assert outcome(tmp_path, "batch-slowest", change).verdict is verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(0.57, R), (0.6, S), (1.1, N)])
def test_how_much_sooner_a_start_from_peers_must_be(tmp_path: Path, ratio: float, verdict: Verdict) -> None:
    def change(row: Row) -> dict[str, Any]:
        return {"median_s": ratio if row["topology"] == "rooted" else 1.0}

    assert outcome(tmp_path, "cold-start-p2p", change).verdict is verdict
