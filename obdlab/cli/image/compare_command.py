"""``obdlab image compare``: are two images, or an image and a directory, the same tree?"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import platform
from obdlab.cli.image.convertoptions import ALL
from obdlab.cli.imageoptions import NAMES, add_image_options, image_client, opened_source
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.numbers import whole
from obdlab.cli.progressbar import Bars
from obdlab.cli.sources import is_local, opened_disk
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    from obdlab.convert.compare.imagetree import Listing
    from obdlab.formats.oci import Platform
    from obdlab.registry.client import RegistryClient

_DIRECTORY = "dir:"
COMPARES = """\
types, modes, owners, times, sizes, content, links, device numbers and extended attributes, path by path, without
mounting either. An overlaybd image is read as the file system (ext4 or EROFS) on its layers, any other by applying
its layers in memory, with the rules of obdlab image convert. Layers are fetched whole and checked against
their digests. The exit status is 0 for equal trees, 1 otherwise."""
_DESCRIPTION = f"""\
Compare two images:
{COMPARES}

{NAMES}
  dir:DIR                        a directory tree, as of an image that another tool has mounted
  FILE[,FILE...]                 a config.v1.json, or layer files, bottom first"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", help="image or directory that is right")
    parser.add_argument("destination", metavar="DST", help="image or directory to compare with it")
    add_comparison_options(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit status and errors")
    add_json_option(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the comparison and the length of its output."""
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]|all", type=_platform, help="default: this machine's")
    parser.add_argument("--no-content", action="store_true", help="do not read files, compare all else")
    parser.add_argument(
        "--ignore", action="append", default=[], choices=("uid", "gid", "mtime_ns", "xattrs"), help="repeatable"
    )
    parser.add_argument(
        "--limit", type=whole(0), default=100, metavar="N", help="differences to print (default: 100)"
    )
    parser.add_argument(
        "--work-dir", type=Path, default=Path("/var/tmp"), help="where layers are fetched to (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Compare; 0 if the trees are equal, 1 if not."""
    return compare_images(args.source, args.destination, args)


def compare_images(source: str, destination: str, args: argparse.Namespace) -> int:
    """Print how ``destination`` differs from ``source``; 0 if the trees are equal, 1 if not."""
    trees: list[dict[str, Any]] = []
    quiet = args.quiet or args.json
    with image_client(args) as client:
        for platform_ in _platforms(source, client, args):
            if args.platform == ALL and not quiet and platform_ is not None:
                print(printable(f"{platform_.os}/{platform_.architecture}:"), file=sys.stderr)
            wanted = _listing(source, platform_, client, args)
            got = _listing(destination, platform_, client, args)
            name = "" if platform_ is None else f"{platform_.os}/{platform_.architecture}"
            lines = _differences(got, wanted, args)
            trees.append({"platform": name, "paths": len(wanted), "differences": list(map(printable, lines))})
            if not quiet:
                _report(lines, wanted, args)
    equal = not any(tree["differences"] for tree in trees)
    if args.json:
        print_json({"equal": equal, "trees": trees})
    return 0 if equal else 1


def _differences(got: Listing, wanted: Listing, args: argparse.Namespace) -> list[str]:
    from obdlab.convert.compare.listing import differences, without_lost_and_found

    # The original leaves lost+found in the images that it converts.
    return differences(without_lost_and_found(got, wanted), wanted, ignore=args.ignore)


def _report(lines: list[str], wanted: Listing, args: argparse.Namespace) -> None:
    for line in lines[: args.limit]:
        print(printable(line))
    if len(lines) > args.limit:
        print(f"... and {len(lines) - args.limit} more")
    print(f"{len(wanted)} paths, {len(lines) or 'no'} differences", file=sys.stderr)


def _platforms(text: str, client: RegistryClient, args: argparse.Namespace) -> list[Platform | None]:
    if args.platform != ALL:
        return [args.platform]
    from obdlab.convert.platforms import images_of

    if is_local(text):
        return [None]
    with opened_source(text, client, args) as source:
        return [entry.platform for entry in images_of(source)] or [None]


def _listing(text: str, platform_: Platform | None, client: RegistryClient, args: argparse.Namespace) -> Listing:
    from obdlab.convert.compare.imagetree import list_disk, list_image
    from obdlab.convert.compare.listing import list_tree

    content = not args.no_content
    if text.startswith(_DIRECTORY):
        return list_tree(os.path.abspath(text.removeprefix(_DIRECTORY)), content=content)
    if is_local(text):
        with opened_disk([text], args) as disk:
            return list_disk(disk, content=content)
    progress = Bars(quiet=args.quiet or args.json)
    with opened_source(text, client, args) as source:
        return list_image(source, platform_, args.work_dir, progress, content=content)


def _platform(text: str) -> Platform | str:
    return ALL if text == ALL else platform(text)
