"""``obdlab trace show``, ``merge``, ``diff`` and ``filter``: traces as sets of reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options
from obdlab.cli.jsonoutput import add_json_option, answer, print_json
from obdlab.cli.numbers import whole
from obdlab.cli.sources import add_source_options
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    import argparse

    from obdlab.formats.trace import Trace


class TraceCommandError(ObdlabError):
    """Traces cannot be read, written or combined."""


def declare_show(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", type=Path, metavar="TRACE")
    parser.add_argument("--reads", action="store_true", help="one line a read: number, layer, offset, length")
    add_json_option(parser, "one JSON object")
    parser.set_defaults(run=run_show)


def declare_merge(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    add_json_option(parser)
    parser.add_argument(
        "--least", type=whole(1), default=1, metavar="N", help="only what at least N of them read (default: 1, all)"
    )
    parser.set_defaults(run=run_merge)


def declare_diff(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("one", type=Path, metavar="TRACE")
    parser.add_argument("other", type=Path, metavar="OTHER")
    add_json_option(parser, "print the ranges as one JSON array")
    parser.set_defaults(run=run_diff)


def declare_filter(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", type=Path, metavar="TRACE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    add_json_option(parser)
    parser.add_argument("--layer", type=whole(0), action="append", metavar="N", help="only of this layer; repeatable")
    parser.add_argument("--first", type=whole(1), metavar="N", help="only the first N reads")
    parser.add_argument("--unique", action="store_true", help="every byte only once, where it is read first")
    parser.add_argument(
        "--fits", nargs="+", metavar="SOURCE", help="only what lies in this image, or these layers, as for attach"
    )
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run_filter)


def run_show(args: argparse.Namespace) -> int:
    """Print the contents of a trace."""
    from obdlab.traces.sets import summary

    trace = _load(args.file)
    facts = summary(trace)
    if args.json:
        print_json(facts)
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
    save_trace(args, merge([_load(path) for path in args.traces], least=args.least))
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Compare two traces; the order of reads does not matter."""
    from obdlab.traces.sets import difference

    one, other = _load(args.one), _load(args.other)
    differ = False
    found = []
    for mark, ranges in (("-", difference(one, other)), ("+", difference(other, one))):
        for layer, begin, end in ranges:
            differ = True
            found.append({"in": "one" if mark == "-" else "other", "layer": layer, "begin": begin, "end": end})
            if not args.json:
                print(f"{mark} layer {layer} [{begin}, {end})")
    if args.json:
        print_json(found)
    return int(differ)


def run_filter(args: argparse.Namespace) -> int:
    """Keep part of a trace."""
    from obdlab.traces.sets import select, unique

    trace = _load(args.file)
    sizes = None
    if args.fits:
        from obdlab.cli.sources import opened_disk

        with opened_disk(args.fits, args) as disk:
            sizes = [layer.data.size for layer in disk.layers]
    trace = select(trace, layers=args.layer, sizes=sizes, first=args.first)
    save_trace(args, unique(trace) if args.unique else trace)
    return 0


def _load(path: Path) -> Trace:
    from obdlab.formats.trace import Trace
    from obdlab.traces.replay import load_file

    return Trace.from_bytes(load_file(str(path)), name=str(path))


def save_trace(args: argparse.Namespace, trace: Trace, **more: object) -> None:
    """Write a trace to ``args.output``, and print a summary; ``more`` is added to that of --json.

    Raises TraceCommandError if the trace is empty.
    """
    from obdlab.system.newfile import new_file

    path = args.output
    if not len(trace):
        raise TraceCommandError(f"{path}: not written, as nothing is left of the trace")
    with new_file(path, force=True) as file:
        file.write(trace.to_bytes())
    facts = {"output": str(path), "reads": len(trace), "size": trace.size, **more}
    answer(args, facts, f"{path}: {len(trace)} reads, {trace.size} bytes")
