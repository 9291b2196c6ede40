"""What the notebooks of the evaluation show. Needs the ``lab`` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import IPython.display

from obdlab.lab.evaluation import ledger
from obdlab.lab.evaluation.claims import CLAIMS
from obdlab.lab.evaluation.plots import draw
from obdlab.lab.evaluation.questions import question
from obdlab.lab.evaluation.results import Results, busy
from obdlab.lab.evaluation.tables import table
from obdlab.lab.experiment import default_results

_ipython: Any = IPython.display  # untyped


class Page:
    """One question's page: over the results below ``results`` (default: those of the quick evaluation)."""

    def __init__(self, key: str, results: str | Path = "") -> None:
        self.question = question(key)
        self.results = Results(Path(results) if results else default_results() / "evaluation-quick")

    def introduction(self) -> None:
        """Show what is asked, and what differs from the paper's set-up."""
        asked = self.question
        figure = f"The paper's {asked.figure.replace('Fig', 'figure')}. " if asked.figure else ""
        _show(_ipython.Markdown(f"{figure}{asked.asks}\n\n*{asked.differs}*"))

    def figure(self) -> None:
        """Show the figure."""
        import matplotlib.pyplot as plt

        figure = draw(self.question.key, self.results)
        _show(figure)
        plt.close(figure)

    def table(self) -> None:
        """Show medians with 95 % intervals."""
        for run in self.question.runs:
            found = table(self.results, run)
            if found.empty:
                why = self.results.why_not(run) or f"not measured below {self.results.root}"
                _show(_ipython.Markdown(f"**{run.name}**: {why}"))
                continue
            _show(_ipython.Markdown(f"**{run.name}** (`experiments/{run.declaration}`), medians [95 % interval]"))
            _show(_ipython.HTML(found.to_html(index=False, border=0)))

    def verdicts(self) -> None:
        """Show what became of the paper's claims."""
        entries = ledger.ledger(self.results, self.question.key)
        if entries:
            _show(_ipython.HTML(ledger.as_html(entries)))

    def provenance(self) -> None:
        """Show where the rows are, and on what they were measured."""
        lines = []
        for run in self.question.runs:
            rows = self.results.rows(run)
            if not rows:
                continue
            quiet = "; some on a busy host" if busy(rows) else ""
            lines.append(f"- `{self.results.directory(run)}/rows.csv`: {len(rows)} rows{quiet}")
            lines += [f"    - {_about(environment)}" for environment in self.results.environments(run)]
        _show(_ipython.Markdown("\n".join(lines) or "No rows."))


class LedgerPage:
    """The whole ledger."""

    def __init__(self, results: str | Path = "") -> None:
        self.results = Results(Path(results) if results else default_results() / "evaluation-quick")

    def table(self) -> None:
        """Show every claim with its verdict."""
        _show(_ipython.HTML(ledger.as_html(ledger.ledger(self.results))))

    def counts(self) -> None:
        """Show how many claims have which verdict."""
        text = ledger.as_text(ledger.ledger(self.results))[-1]
        _show(
            _ipython.Markdown(
                f"{text}. {len({claim.figure for claim in CLAIMS if claim.figure})} figures of the paper."
            )
        )


def _about(environment: dict[str, Any]) -> str:
    known = ("kernel", "cpu", "cpus", "memory_gib", "disk", "git", "obdlab")
    return ", ".join(f"{key} {environment[key]}" for key in known if environment.get(key)) or environment["id"]


def _show(thing: object) -> None:
    _ipython.display(thing)
