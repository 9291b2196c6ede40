"""``obdlab layer seal``: a writable layer turned into a read-only one where it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.cli.packing import add_index_argument, index_from, say

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Appends index and trailer to the layer's data file, which can be used as a lower layer from then on, "
        "and no more be written. Quick, but overwritten data stays in it: commit writes a compact file."
    )
    parser.add_argument("layer", metavar="DATA", help="data file of the writable layer")
    add_index_argument(parser, "; not needed after")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Seal."""
    from obdlab.layers.upper import open_upper

    with open_upper(args.layer, index_from(args)) as upper:
        sealed = upper.seal()
        say(f"{args.layer}: sealed with {len(sealed.index.segments())} segments", quiet=args.quiet)
    return 0
