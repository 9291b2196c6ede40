"""``obdlab image cat``: a file of an image to standard output, without mounting the image."""

from __future__ import annotations

import stat
import sys
from typing import TYPE_CHECKING

from obdlab.cli.image.viewing import PATH_HELP, add_view_options, image_path, opened_tree, shown

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Write a file of an overlaybd image to standard output. Only its blocks are fetched. Needs no root."
    )
    parser.add_argument("path", type=image_path, metavar="IMAGE:/PATH", help=PATH_HELP)
    add_view_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print."""
    from obdlab.volumes.detect import NoSuchFileError

    image, path = args.path
    with opened_tree(image, args) as tree:
        number = tree.find(path)
        if not stat.S_ISREG(tree.inode(number).mode):
            raise NoSuchFileError(f"{shown(path)}: not a regular file (in the image)")
        try:
            for piece in tree.content(number):
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # the reader, such as head, has ended
            sys.stderr.close()
            return 1
    return 0
