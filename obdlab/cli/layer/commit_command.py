"""``obdlab layer commit``: a writable or sealed layer as one compact layer file."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from obdlab.cli.jsonoutput import add_json_option, report
from obdlab.cli.packing import (
    add_layer_arguments,
    add_output_options,
    add_packing_options,
    end_politely_on_sigterm,
    layer_files,
    message_argument,
    packing_from,
    size_text,
    uuid_argument,
)
from obdlab.cli.progressbar import progress_bar

if TYPE_CHECKING:
    import argparse

    from obdlab.layers.commit import Committed
    from obdlab.layers.lsmt import Layer
    from obdlab.layers.stack import Stack

_DESCRIPTION = """\
Writes the layer's data in disk order, without overwritten data, and seals it. The layer itself is left as it is.
LAYER is the data file of a writable layer (in append mode its index file follows), or a sealed layer of any kind,
which is compacted or packed again. Its bytes are those of the original's commit with the same algorithm and block
size."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    add_layer_arguments(parser, "data file of a writable layer, or a sealed layer", metavar="LAYER")
    parser.add_argument("output", metavar="OUTPUT", help="the layer file to make")
    add_identity_options(parser)
    add_zero_blocks_option(parser)
    add_packing_options(parser)
    add_output_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def add_zero_blocks_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for blocks that are all zeros."""
    parser.add_argument(
        "--zero-blocks",
        choices=("keep", "mark", "drop"),
        default="keep",
        help="4 KiB blocks of zeros: stored (default, as the original does), marked as zeros, which takes no space, "
        "or left out, which is right only if no layer will lie below",
    )


def add_identity_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for UUIDs and message of the written layer."""
    group = parser.add_argument_group("names")
    group.add_argument(
        "--uuid", type=uuid_argument, metavar="UUID", default="", help="UUID of the new layer (default: all zeros)"
    )
    group.add_argument(
        "--parent-uuid", type=uuid_argument, metavar="UUID", help="UUID of the layer below (default: kept)"
    )
    group.add_argument("-m", "--message", type=message_argument, default="", help="up to 256 bytes kept in the layer")


def run(args: argparse.Namespace) -> int:
    """Commit."""
    from obdlab.layerfiles.disks import open_any_layer

    end_politely_on_sigterm()
    files = layer_files(args)
    with closing(open_any_layer(files.data, files.index)) as layer:
        write_layer_of(layer, args)
    return 0


def write_layer_of(source: Layer | Stack, args: argparse.Namespace) -> None:
    """Write a layer or a stack to the output that the arguments name, with a bar and a summary."""
    from obdlab.layerfiles.writing import commit_size, write_layer
    from obdlab.layers.commit import ZeroBlocks

    with progress_bar(args.output, commit_size(source), quiet=args.quiet or args.json) as progress:
        committed = write_layer(
            source,
            args.output,
            packing_from(args),
            uuid=args.uuid,
            parent_uuid=args.parent_uuid,
            user_tag=args.message,
            zero_blocks=ZeroBlocks(args.zero_blocks),
            force=args.force,
            progress=progress,
        )
    report_layer(args, committed)


def report_layer(args: argparse.Namespace, committed: Committed) -> None:
    """Print the sizes of the layer file."""
    from pathlib import Path

    size, stored = committed.data_sectors * 512, Path(args.output).stat().st_size
    report(
        args,
        f"{args.output}: {size_text(size)} of data in {committed.records} segments, stored in {size_text(stored)}",
        {"output": args.output, "data_size": size, "segments": committed.records, "stored_size": stored},
    )
