"""Common parts of the evaluation's notebooks: measuring a question's experiments, showing all but its figure.

The figure itself is drawn in the notebook, from the rows to the axes. Needs the ``lab`` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import IPython.display
import pandas as pd

from obdlab.lab.kinds import KINDS
from obdlab.lab.paper import ledger
from obdlab.lab.paper.claims import CLAIMS
from obdlab.lab.paper.published import paper_values
from obdlab.lab.paper.questions import Run, question
from obdlab.lab.paper.results import Results, busy
from obdlab.lab.paper.running import run_all, specs
from obdlab.lab.paper.tables import as_html, table
from obdlab.lab.run.rows import flatten, one_per_attempt, told_apart
from obdlab.lab.run.spec import SpecError
from obdlab.lab.show import style
from obdlab.lab.testbed.process import LabError
from obdlab.lab.workbench import default_results

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from obdlab.lab.run.spec import Spec

_ipython: Any = IPython.display  # untyped
#: Parameters of the notebooks that are not the experiment's.
_OWN = ("results", "measure")
QUICK = "evaluation-quick"


class Page:
    """One question's page. ``given`` are the notebook's parameters, by name.

    ``results`` is the directory of results ("": results/evaluation-quick in the checkout). All others but ``measure``
    change the question's first experiment, by the names of its axes, options and keys. All other values are
    those of the declaration's quick mode. Raises SpecError for a name or value that the experiment does not have.
    """

    def __init__(self, key: str, given: Mapping[str, Any]) -> None:
        self.question = question(key)
        root = given.get("results") or default_results() / QUICK
        self.results = Results(Path(root).resolve())
        self._measures = bool(given.get("measure", False))
        changes = {name: value for name, value in given.items() if name not in _OWN}
        first = self.question.runs[0]
        self.specs = specs(self.question.runs, quick=True, changes={})
        self.specs[first.name] = changed(self.specs[first.name], changes)

    def measure(self) -> None:
        """Measure the cells that have no row yet, if the notebook is to measure; a stopped run goes on.

        Raises LabError if an experiment could not be run.
        """
        if not self._measures:
            return
        failed = run_all(self.specs, self.results, lambda text: print(text, flush=True))
        if failed:
            raise LabError("; ".join(f"{name}: {why}" for name, why in failed.items()))

    def rows(self, name: str = "", **where: Any) -> pd.DataFrame:
        """Return the good rows of one of the question's experiments (default: the first), one for each sample.

        Nested values have columns ``outer.inner``. The frame has all columns of the kind even without rows.
        """
        run = self._run(name)
        found = one_per_attempt(told_apart(self.results.rows(run, **where)))
        kind = KINDS[self.specs[run.name].kind]
        columns = [*kind.axes, *(metric.key for metric in kind.metrics), "start", "repeat"]
        if not found:
            return pd.DataFrame(columns=columns)
        # In the order of the declaration, not of measuring.
        axes = self.specs[run.name].axes
        order = {axis: {str(value): place for place, value in enumerate(values)} for axis, values in axes.items()}
        found.sort(key=lambda row: [order[axis].get(str(row.get(axis)), len(order[axis])) for axis in order])
        return pd.DataFrame([flatten(row) for row in found])

    def introduction(self) -> None:
        """Show the question, and the differences from the paper's set-up."""
        asked = self.question
        figure = f"The paper's {asked.figure.replace('Fig', 'figure')}. " if asked.figure else ""
        _show(_ipython.Markdown(f"{figure}{asked.asks}\n\n*{asked.differs}*"))

    def show(self, figure: Figure) -> None:
        """Show a figure with its caption, and keep it for print in ``figures`` below the results; close it."""
        import matplotlib.pyplot as plt

        if not style.is_empty(figure):
            rows = [row for run in self.question.runs for row in self.results.rows(run)]
            environments = [each for run in self.question.runs for each in self.results.environments(run)]
            text = f"{self.question.title} {style.caption(rows, environments)}".strip()
            stem = self.results.root / "figures" / self.question.key
            picture = style.publish(figure, stem, text)
            _show(_ipython.Image(picture, format="png", retina=True, alt=f"Figure: {self.question.title}"))
            _show(_ipython.Markdown(f"*{text}*"))
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
        origins: dict[str, None] = {}
        for run in self.question.runs:
            rows = self.results.rows(run)
            if not rows:
                continue
            origin = str(rows[0].get("label", "measured"))
            origins[origin] = None
            quiet = "; some on a busy host" if busy(rows) else ""
            place = self.results.directory(run).relative_to(self.results.root.parent)
            lines.append(f"- `{place}/rows.csv`: {len(rows)} rows, {origin}{quiet}")
            lines += [f"    - {_about(environment)}" for environment in self.results.environments(run)]
        if lines:
            _show(_ipython.Markdown("\n".join([f"**Where it was {' and '.join(origins)}**", "", *lines])))

    def _run(self, name: str) -> Run:
        for run in self.question.runs:
            if name in ("", run.name):
                return run
        known = ", ".join(run.name for run in self.question.runs)
        raise SpecError(f"no such experiment of this question (got {name!r}, wanted one of {known})")


class LedgerPage:
    """The whole ledger."""

    def __init__(self, results: str | Path = "") -> None:
        self.results = Results(Path(results) if results else default_results() / QUICK)

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


def changed(spec: Spec, values: Mapping[str, Any]) -> Spec:
    """Return a spec with values by the plain names of axes, options and keys. Raises SpecError."""
    kind = KINDS[spec.kind]
    named = {}
    for name, value in values.items():
        table_name = "axes." if name in kind.axes else "options." if name in kind.options else ""
        named[name if name in kind.short_keys else f"{table_name}{name}"] = value
    return spec.with_values(**named)


def published(figure: str) -> pd.DataFrame:
    """Return the paper's numbers of one figure; ``y`` is NaN where the paper has words or a range."""
    columns = ["series", "x", "y", "unit"]
    frame = pd.DataFrame(
        [[getattr(each, name) for name in columns] for each in paper_values(figure)], columns=columns
    )
    return frame.assign(y=pd.to_numeric(frame["y"], errors="coerce"))


def show_figure(figure: Figure, alternative: str) -> None:
    """Show a figure sharp enough for print, with an alternative text."""
    _show(_ipython.Image(style.as_png(figure), format="png", retina=True, alt=alternative))


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
