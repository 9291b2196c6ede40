"""``obdlab compare``: are two images, or an image and a directory, the same tree?"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_registry_options, platform, registry_from
from obdlab.cli.convert import Bars

if TYPE_CHECKING:
    import argparse

    from obdlab.convert.imagetree import Listing
    from obdlab.registry.client import RegistryClient

_DIRECTORY = "dir:"
_DESCRIPTION = """\
Compare two images path by path, without mounting either: types, modes, owners, times, sizes, content, links,
device numbers and extended attributes.

SRC and DST are registry references (host/name:tag), OCI layout directories (oci:DIR[:TAG]) or directory trees
(dir:DIR), as of a mounted image. An overlaybd image is read as the file system on its layers, any other by applying
its layers in memory, with the rules that obdlab convert applies them by: compare with the mount of another tool to
check the rules themselves. Layers are fetched whole and checked against their digests."""


def add(subcommands: Any) -> None:
    """Declare the command."""
    from argparse import RawDescriptionHelpFormatter

    parser = subcommands.add_parser(
        "compare",
        help="compare an image with its converted image, or with a directory",
        description=_DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="image or directory that is right")
    parser.add_argument("destination", metavar="DST", help="image or directory to compare with it")
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    parser.add_argument("--no-content", action="store_true", help="do not read files, compare all else")
    parser.add_argument(
        "--ignore", action="append", default=[], choices=("uid", "gid", "mtime_ns", "xattrs"), help="repeatable"
    )
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="differences to print (default: 100)")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("/var/tmp"), help="where layers are fetched to (default: %(default)s)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit status and errors")
    add_registry_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare; 0 if the trees are equal, 1 if not."""
    from obdlab.convert.listing import differences

    client = registry_from(args)
    try:
        wanted = _listing(args.source, client, args)
        got = _listing(args.destination, client, args)
    finally:
        client.close()
    lines = differences(got, wanted, ignore=args.ignore)
    if not args.quiet:
        for line in lines[: args.limit]:
            print(line.encode(errors="backslashreplace").decode())
        if len(lines) > args.limit:
            print(f"... and {len(lines) - args.limit} more")
        print(f"{len(wanted)} paths, {len(lines) or 'no'} differences", file=sys.stderr)
    return 1 if lines else 0


def _listing(text: str, client: RegistryClient, args: argparse.Namespace) -> Listing:
    from obdlab.convert.imagetree import list_image
    from obdlab.convert.listing import list_tree
    from obdlab.convert.progress import Silent
    from obdlab.convert.source import open_source

    content = not args.no_content
    if text.startswith(_DIRECTORY):
        return list_tree(os.path.abspath(text.removeprefix(_DIRECTORY)), content=content)
    progress = Silent() if args.quiet else Bars()
    return list_image(open_source(text, client), args.platform, args.work_dir, progress, content=content)
