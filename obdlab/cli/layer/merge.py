"""``obdlab layer merge``: a stack of layers as one layer file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options
from obdlab.cli.jsonoutput import add_json_option
from obdlab.cli.layer.commit_command import add_identity_options, add_zero_blocks_option, write_layer_of
from obdlab.cli.packing import add_output_options, add_packing_options, end_politely_on_sigterm
from obdlab.cli.sources import add_source_options, opened_layers

if TYPE_CHECKING:
    import argparse

_DESCRIPTION = """\
Flattens a stack: writes the disk that its layers show as one sealed layer, without hidden data.
Layers are given bottom first. A single name is that of an image instead, in a registry or stored here, or a
config.v1.json, whose writable layer is flattened too."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.add_argument("layers", nargs="+", metavar="LAYER", help="layer files, bottom first; or an image")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the layer file to make")
    add_identity_options(parser)
    add_zero_blocks_option(parser)
    add_packing_options(parser)
    add_output_options(parser)
    add_json_option(parser)
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge."""
    end_politely_on_sigterm()
    with opened_layers(args.layers, args) as disk:
        write_layer_of(disk, args)
    return 0
