"""``obdlab layer seal``: a writable layer turned into a read-only one where it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.cli.jsonoutput import add_json_option, report
from obdlab.cli.packing import add_layer_arguments, layer_files

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Appends index and trailer to the layer's data file, which can be used as a lower layer from then on, "
        "and no more be written. Quick, but overwritten data stays in it: commit writes a compact file."
    )
    add_layer_arguments(parser, "data file of the writable layer; its index file is not needed after")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Seal."""
    from obdlab.layers.upper import open_upper

    files = layer_files(args)
    with open_upper(files.data, files.index) as upper:
        segments = len(upper.seal().index.segments())
    report(args, f"{files.data}: sealed with {segments} segments", {"data": files.data, "segments": segments})
    return 0
