"""``obdlab image convert-list``: many images, on this host or spread over others."""

from __future__ import annotations

import argparse
import csv
import json
import os
import pickle
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from obdlab.cli.image.convertoptions import add_conversion_options, check_conversion_options
from obdlab.cli.imageoptions import NAMES, add_image_options
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.numbers import whole
from obdlab.cli.packing import mb_text
from obdlab.cli.progressbar import shown_bar
from obdlab.errors import SourceError
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from obdlab.cli.progressbar import Bar
    from obdlab.convert.batch.job import Job, Outcome, Pair
    from obdlab.convert.batch.pool import Pool
    from obdlab.convert.batch.state import Row

_DESCRIPTION = f"""\
Convert all images of a list as `obdlab image convert` converts one, several at once, each in a process of its own.

LIST has a line for each image: source and destination, or the source alone with --to; # begins a comment.
{NAMES}

An image that fails does not keep the others. Failures that may pass (a registry that does not answer) are tried
again. The state of each image is kept in a file beside LIST: the same command, after an interrupt, a kill or an
error, converts the images that are not yet done, and new lines. With --scheduler the workers of a Dask scheduler do
the work, on all of their hosts; named files are then those of the workers' hosts."""
# Conversion options that do not change the result: a list may be resumed with other values.
_COUNT = whole(1, 10_000)
_FREE_OPTIONS = ("work_dir", "platforms_at_once", "memory", "database")
_COLUMNS = (
    "source",
    "destination",
    "state",
    "tries",
    "digest",
    "layers",
    "source_size",
    "size",
    "seconds",
    "host",
    "error",
)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("list", type=Path, metavar="LIST", help="file of images")
    parser.add_argument(
        "--to",
        default="",
        metavar="TEMPLATE",
        help="where images go that LIST gives no destination for, e.g. registry.example/{repository}:{tag}-obd; "
        "{registry}, {repository}, {name} and {tag} are the source's",
    )
    parser.add_argument(
        "-j",
        "--jobs",
        type=_COUNT,
        default=max(1, (os.cpu_count() or 2) // 2),
        metavar="N",
        help="images at once on this host; each keeps two CPUs busy and takes some 150 MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="a Dask scheduler (tcp://HOST:8786): one image at once a worker thread"
    )
    parser.add_argument(
        "--tries", type=_COUNT, default=3, metavar="N", help="for failures that may pass (default: %(default)s)"
    )
    parser.add_argument(
        "--image-timeout-min", type=_COUNT, default=120, metavar="N", help="for one image (default: %(default)s)"
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="state of each image (default: LIST.state.sqlite)")
    parser.add_argument("--restart", action="store_true", help="forget what was done")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="also write the table to FILE, as its name says: .csv or .json"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_json_option(parser, "print the table as one JSON array")
    add_conversion_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert the images of the list; print the outcome of each. Status 1 if one is not done."""
    wrong = check_conversion_options(args)
    if wrong is None and args.report is not None and args.report.suffix not in (".csv", ".json"):
        wrong = f"--report writes .csv or .json, not {args.report.name!r}"
    if wrong is not None:
        print(f"{args.prog}: {wrong}", file=sys.stderr)
        return 2
    from obdlab.convert.batch.run import Run, read_list
    from obdlab.convert.batch.state import BatchState

    pairs = read_list(args.list, args.to)
    path = args.state or args.list.with_name(args.list.name + ".state.sqlite")
    with BatchState(path, _fingerprint(args), restart=args.restart) as state, _signals():
        still = [pair for pair, row in zip(pairs, state.rows(pairs), strict=True) if row.state != "done"]
        if len(still) < len(pairs):
            print(f"{len(pairs) - len(still)} of {len(pairs)} images are done already", file=sys.stderr)
        try:
            with (
                _pool(args) as pool,
                shown_bar(
                    "images", len(pairs), unit="image", quiet=args.quiet, initial=len(pairs) - len(still)
                ) as bar,
            ):
                Run(still, state, pool, _jobs(args), _Bar(bar)).work_off(tries=args.tries)
        except KeyboardInterrupt:
            _summarise(state.rows(pairs), args)
            print("the same command goes on from here", file=sys.stderr)
            raise
        return _summarise(state.rows(pairs), args)


def _pool(args: argparse.Namespace) -> Pool:
    from obdlab.convert.batch.pool import LocalPool, scheduled_pool

    return scheduled_pool(args.scheduler) if args.scheduler else LocalPool(args.jobs)


def _jobs(args: argparse.Namespace) -> Callable[[Pair], Job]:
    from obdlab.convert.batch.job import Job

    options = {name: value for name, value in vars(args).items() if name != "run"}

    def job(pair: Pair) -> Job:
        one = argparse.Namespace(**options | {"source": pair.source, "destination": pair.destination, "quiet": True})
        return Job("obdlab.cli.image.convert_one", pickle.dumps(one), args.image_timeout_min * 60.0)

    return job


def _fingerprint(args: argparse.Namespace) -> str:
    # Defaults are left out, so that new options of a later version do not change it.
    parser = argparse.ArgumentParser()
    add_conversion_options(parser)
    usual = vars(parser.parse_args([]))
    given = {name: getattr(args, name) for name in usual if name not in _FREE_OPTIONS}
    return json.dumps({name: str(value) for name, value in given.items() if value != usual[name]}, sort_keys=True)


class _Bar:
    # One bar over all images; failures are printed above it.
    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._failed = 0

    def finished(self, pair: Pair, outcome: Outcome) -> None:
        if outcome.error:
            self._failed += 1
            self._bar.set_postfix(failed=self._failed)
            self._say(_failure_text(pair, outcome))
        self._bar.update(1)

    def postponed(self, pair: Pair, outcome: Outcome, pause_s: float) -> None:
        self._say(f"{_failure_text(pair, outcome)}; again in {pause_s:.0f} s")

    def _say(self, text: str) -> None:
        self._bar.write(printable(text), file=sys.stderr)


def _summarise(rows: Sequence[Row], args: argparse.Namespace) -> int:
    if args.json:
        print_json(_reported(rows))
    else:
        _print_table(rows)
    if args.report is not None:
        _write_report(rows, args.report)
    return 0 if all(row.state == "done" for row in rows) else 1


def _print_table(rows: Sequence[Row]) -> None:
    print(f"{'image':<44}{'state':<8}{'tries':>5}{'layers':>8}{'source':>12}{'blobs':>12}{'seconds':>9}  host")
    for row in rows:
        found = _values(row)
        print(
            f"{_short(row.source):<44}{row.state:<8}{row.tries:>5}{found['layers']:>8}{mb_text(found['source_size']):>12}"
            f"{mb_text(found['size']):>12}{found['seconds']:>9.1f}  {found['host']}"
        )
        if found["error"]:
            print(f"  {found['error']}")
    states = [row.state for row in rows]
    sizes = [sum(_values(row)[name] for row in rows) for name in ("source_size", "size")]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "failed", "open") if state in states)
    print(f"{len(rows)} images: {counts}; {mb_text(sizes[0])} of layers became {mb_text(sizes[1])}")


def _reported(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{name: _values(row)[name] for name in _COLUMNS} for row in rows]


def _values(row: Row) -> dict[str, Any]:
    from obdlab.convert.batch.job import Outcome

    head = {"source": row.source, "destination": row.destination, "state": row.state, "tries": row.tries}
    return head | asdict(row.outcome or Outcome())


def _write_report(rows: Sequence[Row], path: Path) -> None:
    found = _reported(rows)
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".json":
                json.dump(found, file, indent=1)
            else:
                table = csv.DictWriter(file, _COLUMNS)
                table.writeheader()
                table.writerows(found)
    except OSError as error:
        raise SourceError(f"cannot write the report: {error.strerror}", blob=str(path)) from error


@contextmanager
def _signals() -> Iterator[None]:
    # SIGTERM and the loss of the terminal (unless nohup ignores SIGHUP) also end the command through its cleanup.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _failure_text(pair: Pair, outcome: Outcome) -> str:
    # The error of a part of the image ("NAME, layer 2") names the image already.
    return outcome.error if outcome.blob.startswith(pair.source) else f"{pair.source}: {outcome.error}"


def _short(text: str) -> str:
    return text if len(text) <= 42 else f"...{text[-39:]}"
