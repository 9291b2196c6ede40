"""``obdlab lab run|plan|resume|status|report|list``."""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.lab.run.spec import Spec


def declare_run(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Measures the cells of an experiment (see experiments/README.md) that have no rows yet under "
        "today's code and host, prints the table, and with --report renders the notebook. Needs root."
    )
    _add_spec(parser)
    _add_scheduler(parser)
    parser.add_argument("--again", action="store_true", help="measure everything again; old rows are kept")
    add_locked(parser)
    parser.add_argument("--report", action="store_true", help="render the notebook to report.html")
    add_json_option(parser, "print the results as one JSON object")
    parser.add_argument("--notebook", type=Path, help="(default: that of the kind)")
    parser.set_defaults(run=run, bounded=False)


def declare_plan(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Prints how many repeats each comparison of an experiment needs for a precision, from a pilot's rows, and "
        "how many measurements that makes; measures nothing."
    )
    _add_spec(parser)
    parser.add_argument("--pilot", type=Path, required=True, metavar="DIR", help="results directory of the pilot")
    parser.add_argument(
        "--precision", type=float, default=0.05, help="half of the ratio's 95%% interval as a share (default: 0.05)"
    )
    _add_json(parser)
    parser.set_defaults(run=plan, bounded=False)


def declare_resume(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Goes on with a stopped experiment as it was declared when it began, changes by --set included."
    )
    parser.add_argument("name", help="name of its results directory")
    _add_scheduler(parser)
    add_locked(parser)
    add_json_option(parser, "print the results as one JSON object")
    _add_results(parser)
    parser.set_defaults(run=resume, bounded=False, again=False, report=False)


def declare_status(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Prints how many of an experiment's cells are measured; the status is 1 if any is not."
    _add_spec(parser)
    _add_json(parser)
    parser.set_defaults(run=status, bounded=False)


def declare_show(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Prints headline, table, findings and caveats of a results directory; measures nothing."
    parser.add_argument("name", help="name of its results directory")
    _add_json(parser)
    _add_results(parser)
    parser.set_defaults(run=report, bounded=False)


def declare_list(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.set_defaults(run=list_results, bounded=False)
    _add_json(parser)
    _add_results(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    add_json_option(parser, "one JSON object a line")


def _add_spec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", type=Path, help="declaration, e.g. experiments/quick.toml")
    parser.add_argument("--quick", action="store_true", help="as the declaration's table [quick] says: two minutes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key (TOML value; also axes.NAME and options.NAME)",
    )
    _add_results(parser)


def add_locked(parser: argparse.ArgumentParser) -> None:
    """Declare the option that makes the datasets' locks binding."""
    parser.add_argument(
        "--locked", action="store_true", help="measure only images whose packages are those of packages.lock"
    )


def _add_scheduler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS",
        help="measure on the hosts of a Dask scheduler's workers, e.g. tcp://host:8786 (docs/how-to/own-hosts.md)",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, help="where results are kept (default: results in the checkout)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and, if asked, render the report; 1 if a start failed."""
    return _measure(_declared(args), args)


def plan(args: argparse.Namespace) -> int:
    """Print a line for each comparison, then the sums."""
    from dataclasses import asdict

    from obdlab.lab.run.precision import needs
    from obdlab.lab.run.rows import RowStore

    spec = _declared(args)
    found = needs(spec, RowStore(args.pilot).rows(), args.precision)
    if args.json:
        for need in found:
            print_json(asdict(need))
        return 0
    most = max(need.repeats for need in found)
    print(*(need.line() for need in found), sep="\n")
    print(
        f"{spec.name}: {most} repeats are enough for all ({len(spec.points()) * most} measurements); declared: "
        f"{spec.repeats}, precision {spec.precision:g}"
    )
    return 0


def resume(args: argparse.Namespace) -> int:
    """Measure the cells that the last run of a results directory left out; print the table as ``run`` does."""
    from obdlab.lab.run.declaration import last_spec

    return _measure(last_spec(_directory(args, args.name)), args)


def _declared(args: argparse.Namespace) -> Spec:
    from obdlab.lab.run.declaration import load
    from obdlab.lab.workbench import find

    spec = load(find("experiments", args.spec), quick=args.quick)
    # A run with fewer cells must not pass for the whole experiment.
    named = {"name": f"{spec.name}-quick"} if args.quick else {}
    return spec.with_values(**named, **_changes(args.set))


def _measure(spec: Spec, args: argparse.Namespace) -> int:
    from obdlab.lab.paths import LabPaths
    from obdlab.lab.run.declaration import open_experiment
    from obdlab.lab.run.diskspace import naming_full_disks
    from obdlab.lab.run.interrupts import ending_on_signals
    from obdlab.lab.show.report import check_parameters

    directory = _directory(args, spec.name)
    if args.report:  # errors here must not appear only after an hour of measuring
        check_parameters(_notebook(args, spec), _parameters(spec, directory))
    experiment = open_experiment(spec, directory, LabPaths(locked=args.locked))
    try:
        with ending_on_signals():
            measured = experiment.run(again=args.again, scheduler=args.scheduler)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        raise
    if measured == 0 and not args.json:
        print("everything was measured already under this code and host (--again measures again)")
    lines = experiment.report()
    facts = {"experiment": spec.name, "measured": measured, **experiment.facts(), "rows": f"{directory / 'rows.csv'}"}
    with naming_full_disks(directory):
        (directory / "table.txt").write_text("\n".join(experiment.details()) + "\n")
        lines = [*lines, f"raw rows: {directory / 'rows.csv'}"]
        if args.report:
            report = _report(_notebook(args, spec), spec, directory)
            lines, facts = [*lines, f"report:   {report}"], {**facts, "report": str(report)}
    if args.json:
        print_json(facts)
    else:
        print(*lines, sep="\n")
    return int(any(row.get("error") for row in experiment.rows()))


def _notebook(args: argparse.Namespace, spec: Spec) -> Path:
    from obdlab.lab.kinds import KINDS
    from obdlab.lab.workbench import find

    return find("notebooks", args.notebook or Path("notebooks", KINDS[spec.kind].notebook))


def _report(notebook: Path, spec: Spec, directory: Path) -> Path:
    from obdlab.lab.show.report import run_notebook

    return run_notebook(notebook.resolve(), _parameters(spec, directory), directory / "report.ipynb")


def _parameters(spec: Spec, directory: Path) -> dict[str, Any]:
    return {**spec.declaration(), "results": str(directory.parent), "measure": False}


def _changes(settings: list[str]) -> dict[str, Any]:
    changes = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ObdlabError(f"--set: wanted KEY=VALUE (got {setting!r})")
        try:
            changes[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key] = text
    return changes


def status(args: argparse.Namespace) -> int:
    """Print how many cells are measured under today's code and host, by network; 1 if any is not."""
    from obdlab.lab.run.declaration import open_experiment

    spec = _declared(args)
    missing = 0
    for label, (done, count) in open_experiment(spec, _directory(args, spec.name)).progress().items():
        if args.json:
            print_json({"experiment": spec.name, "conditions": label, "measured": done, "cells": count})
        else:
            print(f"{label}: {done} of {count} cells measured")
        missing += count - done
    return int(missing > 0)


def report(args: argparse.Namespace) -> int:
    """Print the table of a results directory, as ``run`` does at its end, with all findings; 1 if a start failed."""
    from obdlab.lab.run.declaration import last_spec, open_experiment

    directory = _directory(args, args.name)
    experiment = open_experiment(last_spec(directory), directory)
    if args.json:
        print_json({"experiment": args.name, **experiment.facts()})
    else:
        print(*experiment.details(), sep="\n")
    return int(any(row.get("error") for row in experiment.rows()))


def _directory(args: argparse.Namespace, name: str) -> Path:
    from obdlab.lab.workbench import default_results

    results: Path = args.results or default_results()
    return results.resolve() / name


def list_results(args: argparse.Namespace) -> int:
    """Print one line per results directory."""
    from obdlab.lab.run.rows import RowStore
    from obdlab.lab.workbench import default_results

    results = args.results or default_results()
    found = sorted(path.parent for path in results.glob("*/rows.jsonl"))
    if not found and not args.json:
        print(f"nothing measured yet below {results}")
    for directory in found:
        rows = RowStore(directory).rows()
        failed = sum(1 for row in rows if row.get("error"))
        last = max((row.get("started", "") for row in rows), default="")
        if args.json:
            print_json({"name": directory.name, "rows": len(rows), "failed": failed, "last": last})
        else:
            print(f"{directory.name}: {len(rows)} starts, {failed} failed, last {last}")
    return 0
