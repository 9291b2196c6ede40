"""``obdlab layer import``: a virtual machine's disk image as a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.cli.jsonoutput import add_json_option
from obdlab.cli.layer.commit_command import report_layer
from obdlab.cli.numbers import whole
from obdlab.cli.packing import (
    add_output_options,
    add_packing_options,
    end_politely_on_sigterm,
    message_argument,
    packing_from,
    uuid_argument,
)
from obdlab.cli.progressbar import progress_bar
from obdlab.formats.partitiontable import MOST_ENTRIES

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Writes a disk as a layer: all of it, partition table and all, or with --rootfs the partition of its root "
        "file system, which then mounts as an image does. Blocks that are all zeros are left out. qcow2 images are "
        "read by qemu-img (Debian package qemu-utils), and need room for the unpacked disk beside OUTPUT meanwhile. "
        "Images with backing files are refused."
    )
    parser.add_argument("disk", metavar="DISK", help="disk image, or a block device")
    parser.add_argument("output", metavar="OUTPUT", help="the layer file to make")
    parser.add_argument(
        "--format", choices=("raw", "qcow2"), help="of the image (default: seen from its first bytes)"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--rootfs",
        action="store_const",
        const=0,
        dest="partition",
        help="only the root file system's partition, by the table (MBR, GPT) and its types",
    )
    part.add_argument(
        "--partition",
        type=whole(1, MOST_ENTRIES),
        metavar="NUMBER",
        help="only this partition, as Linux counts them",
    )
    parser.add_argument(
        "--uuid", type=uuid_argument, metavar="UUID", default="", help="UUID of the layer (default: zeros)"
    )
    parser.add_argument(
        "-m", "--message", type=message_argument, default="", help="up to 256 bytes kept in the layer"
    )
    add_packing_options(parser)
    add_output_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Import."""
    from obdlab.layerfiles.diskimport import disk_kind, import_disk, work_size

    end_politely_on_sigterm()
    kind = args.format or disk_kind(args.disk)
    with progress_bar(args.output, work_size(args.disk, kind), quiet=args.quiet) as progress:
        committed = import_disk(
            args.disk,
            args.output,
            packing_from(args),
            kind=kind,
            uuid=args.uuid,
            user_tag=args.message,
            force=args.force,
            partition=args.partition,
            progress=progress,
        )
    report_layer(args, committed)
    return 0
