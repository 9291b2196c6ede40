"""``obdlab verify``: read all of a disk's layers, checking whatever can be checked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_runtime_options, settings_from
from obdlab.cli.packing import progress_bar

if TYPE_CHECKING:
    import argparse

    from obdlab.image.verification import VerifiedLayer


def add(subcommands: Any) -> None:
    """Declare the command."""
    parser = subcommands.add_parser(
        "verify",
        help="read layers whole, checking every checksum and their structure",
        description=(
            "Reads every byte of every layer: CRCs of ZFile headers, indexes and blocks, LSMT headers, trailers and "
            "indexes, and whether each layer names the one below as its parent. Layers are given bottom first. A "
            "single config.v1.json names an image instead, whose lowers may lie in a registry."
        ),
    )
    parser.add_argument("layers", nargs="+", metavar="LAYER", help="layer files, bottom first; or a config.v1.json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit status and errors")
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify; the first damage ends it."""
    from dataclasses import asdict

    from obdlab.image.disks import open_disk
    from obdlab.image.verification import verification_size, verify_layers

    verified: list[VerifiedLayer] = []
    with (
        open_disk(args.layers, settings_from(args)) as disk,
        progress_bar("verifying", verification_size(disk), quiet=args.quiet or args.json) as progress,
    ):
        verified.extend(verify_layers(disk, progress))
        size = disk.size
    if args.json:
        print(json.dumps({"disk_size": size, "layers": [asdict(layer) for layer in verified]}, indent=2))
    elif not args.quiet:
        for number, layer in enumerate(verified):
            print(f"{number:3}  {_line(layer)}")
    return 0


def _line(layer: VerifiedLayer) -> str:
    notes = "" if layer.checksums else ", without checksums"
    if not layer.names_parent:
        notes += "; names another parent than the layer below"
    return f"{layer.name}: {layer.size} bytes read, {layer.segments} segments sound{notes}"
