"""The ledger: every claim with its verdict, as rows, as text and as HTML."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from obdlab.lab.paper.claims import CLAIMS
from obdlab.lab.paper.verdicts import Outcome, Verdict, corrected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from obdlab.lab.paper.claim import Claim
    from obdlab.lab.paper.results import Results

HEADER = ("figure", "claim", "paper", "measured here", "verdict", "confidence")
COLOURS = {
    Verdict.REPRODUCED: "#2f7d4f",
    Verdict.SHAPE_ONLY: "#8a7a1f",
    Verdict.NOT_REPRODUCED: "#a63d40",
    Verdict.UNCLEAR: "#7a5c8a",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A claim and its outcome."""

    claim: Claim
    outcome: Outcome

    def cells(self) -> tuple[str, ...]:
        """Return the texts of HEADER's columns."""
        told = self.outcome.measured or self.outcome.because
        claim = self.claim
        return (
            claim.figure or "–",
            claim.says,
            claim.paper,
            told,
            self.outcome.verdict.value,
            self.outcome.confidence,
        )

    def facts(self) -> dict[str, Any]:
        """Return the claim and its outcome as values for programs."""
        outcome = self.outcome
        texts = dict(zip(HEADER, self.cells(), strict=True))
        experiments = [run.name for run in outcome.runs]
        refuted = {"refuted by": self.claim.refuted} if self.claim.refuted else {}
        return {"key": self.claim.key, **texts, "experiments": experiments, "rows": outcome.rows, **refuted}


def ledger(results: Results, question: str = "") -> list[Entry]:
    """Check every claim, or those of one question. Verdicts are corrected for the number of all claims, always."""
    outcomes = corrected([_outcome(claim, results) for claim in CLAIMS])
    entries = map(Entry, CLAIMS, outcomes)
    return [entry for entry in entries if question in ("", entry.claim.question)]


def _outcome(claim: Claim, results: Results) -> Outcome:
    outcome = claim.check(results)
    if outcome.verdict is Verdict.NOT_MEASURED:
        reasons = [why for run in outcome.runs if (why := results.why_not(run))]
        if reasons:
            outcome = Outcome(Verdict.NOT_RUNNABLE, because=reasons[0], runs=outcome.runs)
    return outcome


def as_text(entries: Sequence[Entry]) -> list[str]:
    """Return lines for a terminal."""
    lines = []
    for entry in entries:
        figure, says, paper, told, verdict, trust = entry.cells()
        lines.append(f"{figure:<7} {verdict.upper():<18} {says}")
        lines += [f"{'':<27}paper: {paper}"]
        lines += [f"{'':<27}here:  {told}{f' ({trust})' if trust else ''}"] if told else []
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.outcome.verdict.value] = counts.get(entry.outcome.verdict.value, 0) + 1
    lines.append(f"{len(entries)} claims: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return lines


def as_html(entries: Iterable[Entry], link: Callable[[Entry], str] | None = None) -> str:
    """Return an HTML table. ``link(entry)`` fills a last column with HTML links to an entry's rows and figure."""
    names = (*HEADER, "rows, figure") if link else HEADER
    heads = [f"<th style='text-align:left'>{name}</th>" for name in names]
    lines = ["<table class='ledger'><thead><tr>", *heads, "</tr></thead><tbody>"]
    for entry in entries:
        colour = COLOURS.get(entry.outcome.verdict, "#666666")
        lines.append(f"<tr id='claim-{entry.claim.key}'>")
        for name, text in zip(HEADER, entry.cells(), strict=True):
            style = f";color:{colour};font-weight:600;white-space:nowrap" if name == "verdict" else ""
            lines.append(f"<td style='text-align:left{style}'>{html.escape(text)}</td>")
        lines.append(f"<td>{link(entry)}</td></tr>" if link else "</tr>")
    return "\n".join([*lines, "</tbody></table>"])
