"""``obdlab gc``: free what an append-mode writable layer has overwritten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add(subcommands: Any) -> None:
    """Declare the command."""
    parser = subcommands.add_parser(
        "gc",
        help="free the space of what an append-mode writable layer has overwritten",
        description=(
            "Punches holes where the data file holds nothing that is still seen, moves data together that would keep "
            "mostly empty blocks, and shortens the index file. The layer reads as before, here and with the original "
            "tools, and may be killed at any point. A layer that a device server has open is refused: there its "
            "server collects it (obdlab.layers.gc.collect works on a layer in use). A sparse layer needs no "
            "collection, it frees space when it is discarded."
        ),
    )
    parser.add_argument("data", metavar="DATA", help="data file of the layer")
    parser.add_argument("index", metavar="INDEX", help="index file of the layer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Collect one layer."""
    from obdlab.layers.append import AppendUpper
    from obdlab.layers.gc import collect
    from obdlab.layers.upper import open_upper

    with open_upper(args.data, args.index) as upper:
        if not isinstance(upper, AppendUpper):
            print(f"{args.data}: a sparse layer has nothing to collect")
            return 0
        done = collect(upper)
    freed = done.allocated_before - done.allocated_after
    print(
        f"{args.data}: {done.allocated_after} bytes on disk ({freed} freed, {done.moved_size} moved), "
        f"{done.records_after} index records ({done.records_before} before)"
    )
    return 0
