"""Claims become verdicts: by what was measured, never by what was not."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest

from obdlab.lab.paper import emulated, ledger, questions, simulated
from obdlab.lab.paper.claims import CLAIMS
from obdlab.lab.paper.questions import QUESTIONS, UnknownQuestionError
from obdlab.lab.paper.results import Results, busy
from obdlab.lab.paper.tables import raw, table
from obdlab.lab.paper.verdicts import Verdict
from obdlab.lab.run.rows import with_quiet
from tests.lab.paper.rows import TOTALS, Given, everything, start_rows

_PAPER_FIGURES = {f"Fig {number}" for number in (6, 7, *range(14, 26))}


def verdicts(results: Results) -> dict[str, Verdict]:
    return {entry.claim.key: entry.outcome.verdict for entry in ledger.ledger(results)}


def test_every_figure_of_the_paper_has_a_claim_and_every_claim_a_place() -> None:
    assert {claim.figure for claim in CLAIMS} >= _PAPER_FIGURES
    keys = [claim.key for claim in CLAIMS]
    assert len(set(keys)) == len(keys)
    for claim in CLAIMS:
        assert not claim.question or questions.question(claim.question)
    with pytest.raises(UnknownQuestionError, match="no such question"):
        questions.question("cold-start")


def test_nothing_measured_is_nothing_said(tmp_path: Path) -> None:
    allowed = {Verdict.NOT_MEASURED, Verdict.NOT_RUNNABLE}
    assert set(verdicts(Results(tmp_path)).values()) == allowed


def test_numbers_like_the_papers_reproduce_it(tmp_path: Path) -> None:
    found = verdicts(everything(tmp_path))
    for key in ("cold-start", "warm-start-fast", "trace", "hot-layer", "pull", "launch", "index-size", "size"):
        assert found[key] is Verdict.REPRODUCED, key
    assert found["index-lookups"] is Verdict.REPRODUCED
    # On the slow disk it is no more than on the fast one, in these rows.
    assert found["warm-start-slow"] is Verdict.SHAPE_ONLY
    assert found["build"] is Verdict.NOT_REPRODUCED
    assert {found[claim.key] for claim in (emulated.FROM_PEERS, *emulated.BATCH)} == {Verdict.REPRODUCED}
    assert {found[claim.key] for claim in (*simulated.DADI, *simulated.FAASNET)} == {Verdict.SIMULATED}
    assert Verdict.NOT_MEASURED not in found.values()


@pytest.mark.parametrize(
    ("cold_s", "verdict"),
    [(2.0, Verdict.REPRODUCED), (8.0, Verdict.SHAPE_ONLY), (11.05, Verdict.UNCLEAR), (20.0, Verdict.NOT_REPRODUCED)],
)
def test_how_far_a_ratio_must_go(tmp_path: Path, cold_s: float, verdict: Verdict) -> None:
    results = Given(tmp_path, {"start": start_rows({**TOTALS, ("obdlab", "cold"): cold_s})})
    entry = next(each for each in ledger.ledger(results) if each.claim.key == "cold-start")
    assert entry.outcome.verdict is verdict
    assert entry.outcome.rows == 6
    assert "3 samples" in entry.outcome.confidence


def test_a_busy_host_is_no_good_witness(tmp_path: Path) -> None:
    results = Given(tmp_path, {"start": start_rows(repeats=12, quiet=False)})
    entry = next(each for each in ledger.ledger(results) if each.claim.key == "cold-start")
    assert entry.outcome.confidence == "low: 12 samples, busy host, no A/A"


def test_what_the_paper_does_not_say_is_not_quoted(tmp_path: Path) -> None:
    entries = {entry.claim.key: entry for entry in ledger.ledger(everything(tmp_path))}
    for key in ("du-fast", "du-slow", "tar-fast", "tar-slow", "hot-layer", "launch", "build"):
        assert "paper:" not in entries[key].outcome.measured, key
    assert "(paper: 0.19)" in entries["cold-start"].outcome.measured


def test_the_fastest_is_ahead_of_all_that_was_measured(tmp_path: Path) -> None:
    totals = {("overlayfs", "dropped"): 4.0, ("obdlab", "dropped"): 2.0}
    for others, verdict, place in (
        ({("erofs", "dropped"): 3.0}, Verdict.REPRODUCED, "fastest of 3 (obdlab, erofs, overlayfs)"),
        (
            {("erofs", "dropped"): 1.0, ("loop", "dropped"): 1.5},
            Verdict.NOT_REPRODUCED,
            "third of 4 (erofs, loop, obdlab, overlayfs)",
        ),
    ):
        results = Given(tmp_path, {"scan_tar": start_rows({**totals, **others})})
        entry = next(each for each in ledger.ledger(results) if each.claim.key == "tar-fast")
        assert entry.outcome.verdict is verdict
        assert place in entry.outcome.measured


def test_no_two_verdicts_rest_on_one_statistic() -> None:
    root = Path(__file__).parents[3] / "experiments" / "measured" / "evaluation"
    numbers = [
        tuple(re.findall(r"\d+\.\d+ \[.*?\]", entry.outcome.measured))
        for entry in ledger.ledger(Results(root))
        if entry.outcome.p is not None
    ]
    numbers = [each for each in numbers if each]
    assert len(set(numbers)) == len(numbers) > 5


def test_one_sample_proves_nothing(tmp_path: Path) -> None:
    entries = ledger.ledger(Given(tmp_path, {"start": start_rows(repeats=1)}))
    found = {entry.claim.key: entry.outcome for entry in entries}
    for key in ("cold-start", "trace", "pull"):
        assert found[key].verdict is Verdict.UNCLEAR, key
        assert "[" not in found[key].measured
        assert found[key].confidence.startswith("low: 1 sample")


def test_the_published_ledger_is_what_the_rows_in_the_repository_come_to() -> None:
    root = Path(__file__).parents[3] / "experiments" / "measured"
    entries = ledger.ledger(Results(root / "evaluation"))
    text = ledger.as_text(entries)
    assert (root / "evaluation" / "ledger.txt").read_text().splitlines() == text
    # What the page and the text beside it say.
    assert text[-1] in " ".join((root / "README.md").read_text().split())
    page = (root / "evaluation" / "report.html").read_text()
    for entry in entries:
        row = page.partition(f"<tr id='claim-{entry.claim.key}'>")[2].partition("</tr>")[0]
        assert html.escape(entry.outcome.measured or entry.outcome.because) in row, entry.claim.key
        assert entry.outcome.verdict.value in row, entry.claim.key
    # Every row that a verdict rests on is in the repository.
    for run in questions.runs():
        kept = subprocess.run(
            ["git", "check-ignore", "-q", str(root / "evaluation" / run.name / "rows.jsonl")], check=False, cwd=root
        )
        assert kept.returncode == 1, run.name


def test_warm_and_dropped_starts_know_of_a_busy_host(tmp_path: Path) -> None:
    rows = [
        {"cell": "a", "attempt": 1, "start": "cold", "quiet": False},
        {"cell": "a", "attempt": 1, "start": "warm"},
        {"cell": "a", "attempt": 1, "start": "dropped"},
        {"cell": "b", "attempt": 2, "start": "cold", "quiet": True},
        {"cell": "b", "attempt": 2, "start": "warm"},
    ]
    assert [row["quiet"] for row in with_quiet(rows)] == [False, False, False, True, True]
    assert busy(with_quiet(rows)[1:3])
    assert not busy(with_quiet(rows)[3:])


def test_what_could_not_be_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "random_read").mkdir()
    (tmp_path / "random_read" / "not_run.txt").write_text("fio: not installed\n")
    entry = next(each for each in ledger.ledger(Results(tmp_path)) if each.claim.key == "read-depth-1")
    assert entry.outcome.verdict is Verdict.NOT_RUNNABLE
    assert entry.outcome.because == "fio: not installed"


def test_the_ledger_as_text_and_html(tmp_path: Path) -> None:
    entries = ledger.ledger(everything(tmp_path))
    text = ledger.as_text(entries)
    assert text[-1].startswith(f"{len(CLAIMS)} claims: ")
    page = ledger.as_html(entries, lambda entry: f"<a href='#{entry.claim.key}'>rows</a>")
    assert page.count("<tr") == len(CLAIMS) + 1
    assert "the bars&#x27; numbers" in page


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda asked: asked.key)
def test_every_question_has_tables(tmp_path: Path, asked: questions.Question) -> None:
    for results in (everything(tmp_path), Results(tmp_path)):
        for run in asked.runs:
            found = table(results, run)
            assert found.empty == (not results.rows(run))
            assert len(raw(results, run)) == len(results.rows(run))
            if not found.empty:
                assert found["n"].sum() == len(results.rows(run))
            shown = table(results, run, asked.shown)
            assert shown.empty == found.empty
            for name, values in asked.shown.items():
                assert shown.empty or set(shown[name]) <= set(values)
