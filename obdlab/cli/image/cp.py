"""``obdlab image cp``: files out of an image, without mounting it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.image.viewing import PATH_HELP, add_view_options, image_path, opened_tree
from obdlab.cli.progressbar import shown_bar

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Copy a file, or a directory with all below it, out of an overlaybd image. Only the blocks of these files "
        "are fetched. No existing file is replaced. Needs no root, but for --archive."
    )
    parser.add_argument("path", type=image_path, metavar="IMAGE:/PATH", help=PATH_HELP)
    parser.add_argument(
        "target", type=Path, metavar="TARGET", help="new file or directory, or one that exists to put it into"
    )
    parser.add_argument(
        "-a", "--archive", action="store_true", help="owners, special files, all modes and attributes too (root)"
    )
    add_view_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Copy."""
    from obdlab.volumes.extract import Extractor

    image, path = args.path
    name = os.path.basename(path.rstrip(b"/"))
    target = os.fsencode(args.target)
    if name and args.target.is_dir():
        target = os.path.join(target, name)
    with opened_tree(image, args) as tree, shown_bar(args.path[0], None, delay=1) as bar:
        number = tree.find(path, follow=path.endswith(b"/"))
        if stat.S_ISREG(tree.inode(number).mode):
            bar.total = tree.inode(number).size

        def advance(length: int) -> None:
            bar.update(length)

        Extractor(tree, archive=args.archive, advance=advance).copy(number, target)
    return 0
