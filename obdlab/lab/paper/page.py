"""The report: one HTML file with the ledger, the rendered notebooks and the raw rows. Needs the ``lab`` extra."""

from __future__ import annotations

import base64
import gzip
import html
import re
from collections import Counter
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

from obdlab.lab.paper import ledger
from obdlab.lab.paper.questions import QUESTIONS, runs
from obdlab.lab.paper.verdicts import Verdict
from obdlab.lab.run.rows import write_rows
from obdlab.lab.show.report import ReportError, run_notebook
from obdlab.lab.workbench import folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from obdlab.lab.paper.ledger import Entry
    from obdlab.lab.paper.results import Results

_STYLE = "report.css"


def build_report(
    results: Results, target: Path, *, notebooks: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Render every notebook over the stored results and write the page. Needs no privileges; measures nothing.

    ``notebooks`` is the folder of the notebooks (default: the workbench's). Raises ReportError if a notebook is
    missing or fails.
    """
    sections = []
    for number, asked in enumerate(QUESTIONS, 1):
        say(f"[{number}/{len(QUESTIONS)}] {asked.key}")
        notebook = (notebooks or folder("notebooks") / "evaluation") / f"{asked.key}.ipynb"
        executed = results.root / "notebooks" / notebook.name
        shown = {"results": str(results.root.resolve()), "measure": False}
        run_notebook(notebook.resolve(), shown, executed)
        sections.append(
            f"<h2 id='{asked.key}'>{html.escape(asked.title)}</h2>\n{_body(executed)}\n{_links(results, asked)}"
        )
    entries = ledger.ledger(results)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'><title>obdlab: evaluation</title>",
            "<meta name='viewport' content='width=device-width'>",
            f"<style>{_style()}</style>",
            f"<div class='page'>{_navigation(results)}<main>",
            "<h1 id='top'>The evaluation on this machine</h1>",
            f"<p>Rendered {when}. {len(entries)} claims of the paper:</p>",
            _counts(entries),
            "<h2 id='ledger'>Ledger of claims</h2>",
            ledger.as_html(entries, _link),
            *sections,
            _raw(results),
            "</main></div></html>",
        ]
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _style() -> str:
    return (resources.files("obdlab.lab") / "data" / _STYLE).read_text(encoding="utf-8")


def _navigation(results: Results) -> str:
    lines = ["<nav><a href='#top'><b>Evaluation</b></a><a href='#ledger'>ledger of claims</a><hr>"]
    for asked in QUESTIONS:
        empty = "" if any(results.rows(run) for run in asked.runs) else " class='empty' title='not measured'"
        figure = f"<span>{asked.figure}</span>" if asked.figure else ""
        lines.append(f"<a href='#{asked.key}'{empty}>{figure}{html.escape(asked.key.replace('_', ' '))}</a>")
    return "".join([*lines, "<hr><a href='#raw'>raw rows</a></nav>"])


def _counts(entries: Sequence[Entry]) -> str:
    counts = Counter(entry.outcome.verdict for entry in entries)
    told = (
        f"<span style='color:{ledger.COLOURS.get(verdict, '#666666')}'>{counts[verdict]} {verdict.value}</span>"
        for verdict in sorted(counts, key=list(Verdict).index)
    )
    return f"<p class='counts'>{''.join(told)}</p>"


def _link(entry: Entry) -> str:
    parts = [f"<a href='#raw-{run.name}'>{entry.outcome.rows or ''} rows</a>" for run in entry.outcome.runs]
    if entry.claim.question:
        parts.append(f"<a href='#{entry.claim.question}'>figure</a>")
    return ", ".join(parts)


def _links(results: Results, asked: Any) -> str:
    found = [f"<a href='#raw-{run.name}'>{run.name}</a>" for run in asked.runs if results.rows(run)]
    return f"<p class='download'>Raw rows of all numbers above: {', '.join(found)}.</p>" if found else ""


def _body(executed: Path) -> str:
    from nbconvert import HTMLExporter

    exporter: Any = HTMLExporter  # untyped upstream
    made = exporter(template_name="basic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = made.from_filename(str(executed))
    # The section already has the notebook's title.
    return re.sub(r"<h1.*?</h1>", "", body, count=1, flags=re.DOTALL)


def _raw(results: Results) -> str:
    lines = [
        "<h2 id='raw'>Raw rows</h2><table class='raw'>",
        "<tr><th>experiment</th><th>rows</th><th>download</th></tr>",
    ]
    for run in runs():
        rows = results.rows(run)
        if not rows:
            why = results.why_not(run) or "not measured"
            lines.append(f"<tr id='raw-{run.name}'><td>{run.name}</td><td>0</td><td>{html.escape(why)}</td></tr>")
            continue
        path = results.directory(run) / "used.csv"
        write_rows(rows, path)
        links = [_download(path, f"{run.name}.csv.gz")]
        for name in ("environments.jsonl", "spec.json"):
            file = results.directory(run) / name
            links += [_download(file, f"{run.name}-{name}.gz")] if file.is_file() else []
        lines.append(
            f"<tr id='raw-{run.name}'><td>{run.name}</td><td>{len(rows)}</td><td>{' '.join(links)}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])


def _download(path: Path, name: str) -> str:
    try:
        data = gzip.compress(path.read_bytes(), mtime=0)
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    text = base64.b64encode(data).decode()
    return f"<a download='{name}' href='data:application/gzip;base64,{text}'>{name}</a>"
