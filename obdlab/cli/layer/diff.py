"""``obdlab layer diff``: which ranges two disks differ in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_runtime_options
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.packing import size_text
from obdlab.cli.progressbar import progress_bar
from obdlab.cli.sources import add_source_options, opened_layers

if TYPE_CHECKING:
    import argparse

    from obdlab.layerfiles.compare import Difference

#: Exit status for disks that differ: neither success nor one of the statuses for failures.
DIFFERENT = 3
_SHOWN = 20


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Compares what two stacks of layers show, byte by byte, and lists the ranges that differ. Exit status "
        f"0: same size and content, {DIFFERENT}: different, 1: failed."
    )
    for name in ("old", "new"):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            required=True,
            metavar="LAYER",
            help=f"layers of the {name} disk, bottom first; or an image",
        )
    add_json_option(parser, "print JSON, with all ranges as [begin, end) in bytes")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit status")
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare."""
    from obdlab.layerfiles.compare import compare

    with (
        opened_layers(args.old, args) as old,
        opened_layers(args.new, args) as new,
        progress_bar("comparing", max(old.size, new.size), quiet=args.quiet or args.json) as progress,
    ):
        difference = compare(old, new, progress)
    if args.json:
        print_json(_document(difference), indent=2)
    elif not args.quiet:
        _print(difference)
    return 0 if difference.same else DIFFERENT


def _document(difference: Difference) -> dict[str, Any]:
    return {
        "same": difference.same,
        "old_size": difference.old_size,
        "new_size": difference.new_size,
        "differing_size": difference.size,
        "compared_size": difference.compared,
        "ranges": [list(bounds) for bounds in difference.ranges],
    }


def _print(difference: Difference) -> None:
    if difference.old_size != difference.new_size:
        print(f"sizes differ: {difference.old_size} and {difference.new_size} bytes")
    if not difference.ranges:
        print("same content" if difference.same else "same content up to the smaller size, zeros after it")
        return
    print(f"{size_text(difference.size)} differ, in {len(difference.ranges)} ranges")
    for begin, end in difference.ranges[:_SHOWN]:
        print(f"  {begin:>16} to {end:>16}  {size_text(end - begin)}")
    if len(difference.ranges) > _SHOWN:
        print(f"  and {len(difference.ranges) - _SHOWN} more (--json lists all)")
