"""``obdlab trace``: record the reads of a device's users; show, combine and change traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli import trace_events, trace_images, trace_publish, trace_record
from obdlab.cli.common import add_registry_options, add_runtime_options
from obdlab.cli.numbers import whole
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    import argparse

    from obdlab.formats.trace import Trace


class TraceCommandError(ObdlabError):
    """Traces cannot be read, written or combined."""


def add(subcommands: Any) -> None:
    """Declare the commands."""
    parser = subcommands.add_parser(
        "trace",
        help="record what is read of an image's layers, to have it fetched ahead the next time",
        description=(
            "A trace lists the reads of an image's layers in order, in the original's file format. What it lists is "
            "fetched ahead of readers if the image is attached with --trace, has the trace in an acceleration layer, "
            "or names it as recordTracePath in its config.v1.json."
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    trace_record.add(actions)

    show = actions.add_parser("show", help="what is in a trace")
    show.add_argument("file", type=Path, metavar="TRACE")
    show.add_argument("--reads", action="store_true", help="one line a read: number, layer, offset, length")
    show.add_argument("--json", action="store_true", help="one JSON object")
    show.set_defaults(run=run_show)

    merge = actions.add_parser("merge", help="one trace of several runs, in the order of first use")
    merge.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    merge.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    merge.add_argument(
        "--least", type=whole(1), default=1, metavar="N", help="only what at least N of them read (default: 1, all)"
    )
    merge.set_defaults(run=run_merge)

    diff = actions.add_parser("diff", help="what one trace reads and another does not; status 1 if they differ")
    diff.add_argument("one", type=Path, metavar="TRACE")
    diff.add_argument("other", type=Path, metavar="OTHER")
    diff.set_defaults(run=run_diff)

    chosen = actions.add_parser("filter", help="part of a trace")
    chosen.add_argument("file", type=Path, metavar="TRACE")
    chosen.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    chosen.add_argument("--layer", type=whole(0), action="append", metavar="N", help="only of this layer; repeatable")
    chosen.add_argument("--first", type=whole(1), metavar="N", help="only the first N reads")
    chosen.add_argument("--unique", action="store_true", help="every byte only once, where it is read first")
    chosen.add_argument(
        "--fits", nargs="+", metavar="SOURCE", help="only what lies in this image, or these layers, as for attach"
    )
    add_runtime_options(chosen)
    add_registry_options(chosen)
    chosen.set_defaults(run=run_filter)
    trace_images.add(actions)
    trace_events.add(actions)
    trace_publish.add(actions)


def run_show(args: argparse.Namespace) -> int:
    """Print the contents of a trace."""
    from obdlab.traces.sets import summary

    trace = _load(args.file)
    facts = summary(trace)
    if args.json:
        print(json.dumps(facts))
        return 0
    print(f"{args.file}: {facts['reads']} reads, {facts['size']} bytes ({facts['unique_size']} different ones)")
    for layer in facts["layers"]:
        print(
            f"  layer {layer['layer']}: {layer['reads']} reads, {layer['unique_size']} different bytes, "
            f"up to offset {layer['end']}"
        )
    if args.reads:
        for number, (layer_number, offset, length) in enumerate(trace.reads()):
            print(f"{number}\t{layer_number}\t{offset}\t{length}")
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Combine traces."""
    from obdlab.traces.sets import merge

    if args.least > len(args.traces):
        raise TraceCommandError(f"--least: wanted 1 to {len(args.traces)} (got {args.least})")
    save_trace(args.output, merge([_load(path) for path in args.traces], least=args.least))
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Compare two traces; the order of reads does not matter."""
    from obdlab.traces.sets import difference

    one, other = _load(args.one), _load(args.other)
    differ = False
    for mark, ranges in (("-", difference(one, other)), ("+", difference(other, one))):
        for layer, begin, end in ranges:
            differ = True
            print(f"{mark} layer {layer} [{begin}, {end})")
    return int(differ)


def run_filter(args: argparse.Namespace) -> int:
    """Keep part of a trace."""
    from obdlab.traces.sets import select, unique

    trace = _load(args.file)
    sizes = None
    if args.fits:
        with trace_images.opened(args.fits, args) as disk:
            sizes = [layer.data.size for layer in disk.layers]
    trace = select(trace, layers=args.layer, sizes=sizes, first=args.first)
    save_trace(args.output, unique(trace) if args.unique else trace)
    return 0


def _load(path: Path) -> Trace:
    from obdlab.formats.trace import Trace
    from obdlab.traces.replay import load_file

    return Trace.from_bytes(load_file(str(path)), name=str(path))


def save_trace(path: Path, trace: Trace) -> None:
    """Write a trace to a file, and print a summary. Raises TraceCommandError if the trace is empty."""
    from obdlab.system.newfile import new_file

    if not len(trace):
        raise TraceCommandError(f"{path}: not written, as nothing is left of the trace")
    with new_file(path, force=True) as file:
        file.write(trace.to_bytes())
    print(f"{path}: {len(trace)} reads, {trace.size} bytes")
