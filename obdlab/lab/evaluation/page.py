"""The report: one HTML file with the ledger, the rendered notebooks and the raw rows. Needs the ``lab`` extra."""

from __future__ import annotations

import base64
import gzip
import html
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.lab.evaluation import ledger
from obdlab.lab.evaluation.questions import QUESTIONS, runs
from obdlab.lab.report import ReportError, run_notebook
from obdlab.lab.rows import write_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.lab.evaluation.ledger import Entry
    from obdlab.lab.evaluation.results import Results

NOTEBOOKS = Path(__file__).parents[3] / "notebooks" / "evaluation"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1.5em; color: #222; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2.2em; border-top: 1px solid #ddd; padding-top: 1em; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; }
th { text-align: left; border-bottom: 1px solid #999; } th, td { padding: .25em .8em .25em 0; vertical-align: top; }
tr + tr td { border-top: 1px solid #eee; } img { max-width: 100%; } pre { font-size: 13px; }
nav a { margin-right: 1em; white-space: nowrap; } .raw td { font-variant-numeric: tabular-nums; }
"""


def build_report(
    results: Results, target: Path, *, notebooks: Path = NOTEBOOKS, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Render every notebook over the stored results and write the page. Needs no privileges; measures nothing.

    Raises ReportError if a notebook is missing or fails.
    """
    sections = []
    for number, asked in enumerate(QUESTIONS, 1):
        say(f"[{number}/{len(QUESTIONS)}] {asked.key}")
        notebook = notebooks / f"{asked.key}.ipynb"
        executed = results.root / "notebooks" / notebook.name
        run_notebook(notebook.resolve(), {"results": str(results.root.resolve())}, executed)
        sections.append(
            f"<h2 id='{asked.key}'>{html.escape(asked.title)}</h2>\n{_body(executed)}\n{_links(results, asked)}"
        )
    entries = ledger.ledger(results)
    counts = ledger.as_text(entries)[-1]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = "\n".join(
        [
            "<!doctype html><html lang='en'><meta charset='utf-8'><title>obdlab: evaluation</title>",
            f"<style>{_STYLE}</style>",
            f"<h1>The evaluation on this machine</h1><p>{when}. {html.escape(counts)}.</p>",
            "<nav>" + "".join(f"<a href='#{q.key}'>{html.escape(q.key.replace('_', ' '))}</a>" for q in QUESTIONS),
            "<a href='#raw'>raw rows</a></nav>",
            "<h2 id='ledger'>Ledger of claims</h2>",
            ledger.as_html(entries, _link),
            *sections,
            _raw(results),
            "</html>",
        ]
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _link(entry: Entry) -> str:
    parts = [f"<a href='#raw-{run.name}'>{entry.outcome.rows or ''} rows</a>" for run in entry.outcome.runs]
    if entry.claim.question:
        parts.append(f"<a href='#{entry.claim.question}'>figure</a>")
    return ", ".join(parts)


def _links(results: Results, asked: Any) -> str:
    found = [f"<a href='#raw-{run.name}'>{run.name}</a>" for run in asked.runs if results.rows(run)]
    return f"<p>Raw rows of all numbers above: {', '.join(found) or 'none'}.</p>"


def _body(executed: Path) -> str:
    from nbconvert import HTMLExporter

    exporter: Any = HTMLExporter  # untyped upstream
    made = exporter(template_name="basic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = made.from_filename(str(executed))
    # The notebook's own title is the section's.
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
