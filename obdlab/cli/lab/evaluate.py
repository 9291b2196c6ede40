"""``obdlab lab evaluate`` and ``obdlab lab report``: the paper's evaluation on this machine."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.lab.experiment_command import add_locked
from obdlab.command import command
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    import argparse

    from obdlab.lab.paper.results import Results

_QUICK, _FULL = "evaluation-quick", "evaluation"


class EvaluateError(ObdlabError):
    """The command line names something that does not exist."""


def declare_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Runs the experiments that the questions (all, or those named) need and that have no rows yet, then "
        "checks the paper's claims and renders the report. A run that was stopped goes on where it was. Needs "
        "root."
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="such as cold_start (default: all)")
    parser.add_argument("--full", action="store_true", help="with all repeats: hours (default: the quick modes)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="EXPERIMENT.KEY=VALUE",
        help="change a key of an experiment (TOML value), e.g. start.repeats=5",
    )
    parser.add_argument("--list", action="store_true", help="only list questions and experiments")
    add_locked(parser)
    add_json_option(parser, "print the ledger, one JSON object a claim; with --list one a question")
    parser.add_argument("--no-report", action="store_true", help="measure and print the ledger only")
    _add_places(parser)
    parser.set_defaults(run=run_evaluate, bounded=False)


def declare_report(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Renders one HTML file from the notebooks over stored results; measures nothing, needs no root."
    )
    parser.add_argument("--full", action="store_true", help="of the full evaluation (default: the quick one)")
    parser.add_argument("--ledger", action="store_true", help="only print the ledger")
    add_json_option(parser, "only print the ledger, one JSON object a claim")
    _add_places(parser)
    parser.set_defaults(run=run_report, bounded=False)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, help="directory of results (default: results/evaluation-quick)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html beside the results")


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure, print, render; 1 if an experiment could not be run."""
    from obdlab.lab.paper.questions import QUESTIONS
    from obdlab.lab.paper.running import chosen_runs, run_all, specs
    from obdlab.lab.paths import LabPaths
    from obdlab.lab.run.interrupts import ending_on_signals

    chosen = chosen_runs(args.questions)
    planned = specs(chosen, quick=not args.full, changes=_changes(args.set))
    if args.list:
        for asked in QUESTIONS:
            names = ", ".join(run.name for run in asked.runs)
            facts = {"question": asked.key, "figure": asked.figure, "title": asked.title, "experiments": names}
            if args.json:
                print_json(facts)
                continue
            print(f"{asked.key:<16} {asked.figure or '-':<7} {asked.title} ({names})")
        return 0
    results = _results(args)
    paths = LabPaths(locked=args.locked)
    with ending_on_signals():
        failed = run_all(planned, results, lambda text: print(text, file=sys.stderr, flush=True), paths)
    _print_ledger(results, as_json=args.json)
    if not args.no_report:
        report = _render(args, results)
        print(f"report: {report}", file=sys.stderr if args.json else sys.stdout)
    return int(bool(failed))


def run_report(args: argparse.Namespace) -> int:
    """Render the stored rows."""
    results = _results(args)
    if not results.root.is_dir():
        raise EvaluateError(f"{results.root}: no results (see: {command('lab', 'evaluate')})")
    _print_ledger(results, as_json=args.json)
    if not (args.ledger or args.json):
        print(f"report: {_render(args, results)}")
    return 0


def _results(args: argparse.Namespace) -> Results:
    from obdlab.lab.paper.results import Results
    from obdlab.lab.workbench import default_results

    return Results((args.results or default_results() / (_FULL if args.full else _QUICK)).resolve())


def _print_ledger(results: Results, *, as_json: bool) -> None:
    from obdlab.lab.paper import ledger

    if as_json:
        for entry in ledger.ledger(results):
            print_json(entry.facts())
        return
    print(*ledger.as_text(ledger.ledger(results)), sep="\n")


def _render(args: argparse.Namespace, results: Results) -> Path:
    from obdlab.lab.paper.page import build_report

    target = args.output or results.root / "report.html"
    return build_report(results, target, say=lambda text: print(text, file=sys.stderr, flush=True))


def _changes(settings: list[str]) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {}
    for setting in settings:
        where, equals, text = setting.partition("=")
        name, dot, key = where.partition(".")
        if not equals or not dot or not key:
            raise EvaluateError(f"--set: wanted EXPERIMENT.KEY=VALUE (got {setting!r})")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        changes.setdefault(name, {})[key] = value
    return changes
