"""The content of the evaluation's notebooks. Needs the ``lab`` extra."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import IPython.display

from obdlab.lab.paper import ledger
from obdlab.lab.paper.claims import CLAIMS
from obdlab.lab.paper.plots import draw, is_empty
from obdlab.lab.paper.questions import question
from obdlab.lab.paper.results import Results, busy
from obdlab.lab.paper.tables import as_html, table
from obdlab.lab.workbench import default_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ipython: Any = IPython.display  # untyped


class Page:
    """One question's page over the results below ``results`` (default: those of the quick evaluation)."""

    def __init__(self, key: str, results: str | Path = "") -> None:
        self.question = question(key)
        self.results = Results(Path(results) if results else default_results() / "evaluation-quick")

    def introduction(self) -> None:
        """Show the question, and the differences from the paper's set-up."""
        asked = self.question
        figure = f"The paper's {asked.figure.replace('Fig', 'figure')}. " if asked.figure else ""
        _show(_ipython.Markdown(f"{figure}{asked.asks}\n\n*{asked.differs}*"))

    def figure(self) -> None:
        """Show the figure unless it is empty."""
        import matplotlib.pyplot as plt

        # The notebook's heading already has the title.
        figure = draw(self.question.key, self.results, titled=False)
        if not is_empty(figure):
            show_figure(figure, f"Figure: {self.question.title}")
        plt.close(figure)

    def table(self) -> None:
        """Show medians with 95 % intervals."""
        for run in self.question.runs:
            found = table(self.results, run, self.question.shown)
            if found.empty:
                why = self.results.why_not(run) or f"not measured below {self.results.root}"
                _show(_ipython.Markdown(f"**{run.name}**: {why}"))
                continue
            _show(_ipython.Markdown(f"**{run.name}** (`experiments/{run.declaration}`), medians [95 % interval]"))
            _show(_ipython.HTML(as_html(found)))

    def verdicts(self) -> None:
        """Show the verdicts on the paper's claims."""
        entries = ledger.ledger(self.results, self.question.key)
        if entries:
            _show(_ipython.Markdown("**What becomes of the paper's claims**"))
            _show(_ipython.HTML(ledger.as_html(entries)))

    def provenance(self) -> None:
        """Show the rows' files, and the hosts they were measured on."""
        lines = []
        for run in self.question.runs:
            rows = self.results.rows(run)
            if not rows:
                continue
            quiet = "; some on a busy host" if busy(rows) else ""
            place = self.results.directory(run).relative_to(self.results.root.parent)
            lines.append(f"- `{place}/rows.csv`: {len(rows)} rows{quiet}")
            lines += [f"    - {_about(environment)}" for environment in self.results.environments(run)]
        if lines:
            _show(_ipython.Markdown("\n".join(["**Where it was measured**", "", *lines])))


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


def show_figure(figure: Figure, alternative: str) -> None:
    """Show a figure sharp enough for print, with an alternative text."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=180, bbox_inches="tight")
    _show(_ipython.Image(stream.getvalue(), format="png", retina=True, alt=alternative))


# The most important facts; environments.jsonl has all of them.
_ABOUT = {
    "kernel": "kernel {}",
    "cpu_model": "{}",
    "cores": "{} cores",
    "memory_gib": "{:.0f} GiB",
    "disk": "disk {}",
    "congestion_control": "{}",
    "git_commit": "commit {:.12}",
}


def _about(environment: dict[str, Any]) -> str:
    known = environment | {"memory_gib": environment.get("memory_bytes", 0) / 2**30}
    told = [form.format(known[key]) for key, form in _ABOUT.items() if known.get(key)]
    return ", ".join(told) or str(environment["id"])


def _show(thing: object) -> None:
    _ipython.display(thing)
