"""``obdlab image verify``: read all of a disk's layers and check every checksum; or compare two images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options
from obdlab.cli.image.compare_command import COMPARES, add_comparison_options, compare_images
from obdlab.cli.imageoptions import NAMES, add_image_options
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.progressbar import progress_bar
from obdlab.cli.sources import opened_layers

if TYPE_CHECKING:
    from obdlab.layerfiles.verification import VerifiedLayer

_DESCRIPTION = f"""\
obdlab image verify IMAGE
obdlab image verify LAYER...
Reads every byte of every layer: CRCs of ZFile headers, indexes and blocks, LSMT headers, trailers and indexes, and
whether each layer names the one below as its parent. The image is in a registry or stored here, or a config.v1.json
whose lowers may lie in a registry. Layers are given bottom first.

obdlab image verify SRC DST
Checks a converted image, DST, against its original:
{COMPARES}

{NAMES}"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "layers", nargs="+", metavar="IMAGE|LAYER", help="an image; layer files, bottom first; or SRC and DST"
    )
    add_json_option(parser, "print the result as one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit status and errors")
    add_comparison_options(parser)
    add_runtime_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify, and stop at the first damage. Two images are compared; 1 if they differ."""
    if _are_images(args.layers):
        return compare_images(args.layers[0], args.layers[1], args)
    from dataclasses import asdict

    from obdlab.layerfiles.verification import verification_size, verify_layers

    verified: list[VerifiedLayer] = []
    with (
        opened_layers(args.layers, args) as disk,
        progress_bar("verifying", verification_size(disk), quiet=args.quiet or args.json) as progress,
    ):
        verified.extend(verify_layers(disk, progress))
        size = disk.size
    if args.json:
        print_json({"disk_size": size, "layers": [asdict(layer) for layer in verified]}, indent=2)
    elif not args.quiet:
        for number, layer in enumerate(verified):
            print(f"{number:3}  {_line(layer)}")
    return 0


def _are_images(names: list[str]) -> bool:
    from obdlab.convert.endpoints.forms import names_image

    return len(names) == 2 and all(map(names_image, names))


def _line(layer: VerifiedLayer) -> str:
    notes = "" if layer.checksums else ", without checksums"
    if not layer.names_parent:
        notes += "; names another parent than the layer below"
    return f"{layer.name}: {layer.size} bytes read, {layer.segments} segments sound{notes}"
