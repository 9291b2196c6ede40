"""``obdlab experiment run|list``."""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.lab.spec import Spec

NOTEBOOK = Path("notebooks/cold_warm_startup.ipynb")


def add(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subcommands.add_parser(
        "experiment", help="measure a declared experiment, or list what has been measured"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run_parser = actions.add_parser(
        "run",
        help="measure what is not measured yet",
        description="Measures the cells of an experiment (see experiments/README.md) that have no rows yet under "
        "today's code and host, prints the table, and with --report renders the notebook.",
    )
    run_parser.add_argument("spec", type=Path, help="declaration, e.g. experiments/quick.toml")
    run_parser.add_argument("--results", type=Path, help="where results are kept (default: results in the checkout)")
    run_parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the declaration (TOML value)"
    )
    run_parser.add_argument("--again", action="store_true", help="measure everything anew; old rows are kept")
    run_parser.add_argument("--report", action="store_true", help="render the notebook to report.html")
    run_parser.add_argument("--notebook", type=Path, default=NOTEBOOK, help="(default: %(default)s)")
    run_parser.set_defaults(run=run)
    list_parser = actions.add_parser("list", help="list results")
    list_parser.add_argument("--results", type=Path, help="where results are kept (default: results in the checkout)")
    list_parser.set_defaults(run=list_results)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and, if asked, render the report; 1 if a start failed."""
    from obdlab.lab.experiment import Experiment, default_results
    from obdlab.lab.report import check_parameters
    from obdlab.lab.spec import Spec
    from obdlab.lab.summary import caveats, findings, summarise, text_table

    spec = Spec.load(args.spec).with_values(**_changes(args.set))
    directory = (args.results or default_results()).resolve() / spec.name
    if args.report:  # what is wrong there shall not be told after an hour of measuring
        check_parameters(args.notebook, _parameters(spec, directory))
    experiment = Experiment(spec, directory)
    try:
        measured = experiment.run(again=args.again)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        raise
    if measured == 0:
        print("everything was measured already under this code and host (--again measures anew)")
    rows = experiment.rows()
    failed = [row for row in rows if row.get("error")]
    if len(failed) < len(rows):
        summaries = summarise(rows, baseline=spec.snapshotters[0])
        print(text_table(summaries))
        print(*findings(summaries), sep="\n")
    for sentence in caveats(rows):
        print(sentence)
    print(f"raw rows: {directory / 'rows.csv'}")
    if args.report:
        print(f"report:   {_report(args.notebook, spec, directory)}")
    return int(bool(failed))


def _report(notebook: Path, spec: Spec, directory: Path) -> Path:
    from obdlab.lab.report import run_notebook

    return run_notebook(notebook.resolve(), _parameters(spec, directory), directory / "report.ipynb")


def _parameters(spec: Spec, directory: Path) -> dict[str, Any]:
    return {
        "name": spec.name,
        "images": list(spec.images),
        "rates_mbit": list(spec.rates_mbit),
        "rtts_ms": list(spec.rtts_ms),
        "repeats": spec.repeats,
        "warm_starts": spec.warm_starts,
        "snapshotters": list(spec.snapshotters),
        "a_a": spec.a_a,
        "algorithm": spec.algorithm,
        "block_size": spec.block_size,
        "results": str(directory.parent),
        "measure": False,
    }


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


def list_results(args: argparse.Namespace) -> int:
    """Print one line per results directory."""
    from obdlab.lab.experiment import default_results
    from obdlab.lab.rows import RowStore

    results = args.results or default_results()
    found = sorted(path.parent for path in results.glob("*/rows.jsonl"))
    if not found:
        print(f"nothing measured yet below {results}")
    for directory in found:
        rows = RowStore(directory).rows()
        failed = sum(1 for row in rows if row.get("error"))
        last = max((row.get("started", "") for row in rows), default="")
        print(f"{directory.name}: {len(rows)} starts, {failed} failed, last {last}")
    return 0
