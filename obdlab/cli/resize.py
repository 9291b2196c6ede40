"""``obdlab resize``: a larger disk for a writable layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from obdlab.cli.packing import say, size_argument, size_text

if TYPE_CHECKING:
    import argparse


def add(subcommands: Any) -> None:
    """Declare the command."""
    parser = subcommands.add_parser(
        "resize",
        help="make the disk of a writable layer larger",
        description=(
            "Grows the disk that a writable layer makes, with or without layers below. The file system on it is as "
            "large as before: attach the disk and run resize2fs on the device. Disks never shrink."
        ),
    )
    parser.add_argument("layer", metavar="DATA", help="data file of the writable layer, which nobody has open")
    parser.add_argument("--index", metavar="FILE", default="", help="index file of a layer in append mode")
    parser.add_argument(
        "--vsize", type=size_argument, required=True, metavar="SIZE", help="new size in bytes, or as 512M, 64G, 1T"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Resize."""
    from obdlab.layers.upper import open_upper

    with open_upper(args.layer, args.index) as upper:
        before = upper.virtual_size
        upper.set_virtual_size(args.vsize)
        upper.flush()
    say(f"{args.layer}: a disk of {size_text(args.vsize)} (was {size_text(before)})", quiet=args.quiet)
    return 0
