"""``obdlab image protect``: add hash trees to an image in a registry, so that readers can check each unit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from obdlab.cli.common import add_registry_options, registry_from
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.command import command
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    import argparse


class ProtectError(ObdlabError):
    """The arguments name no tag to store the image under."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Gives every layer of an overlaybd image in a registry a hash tree, by which lazily read units are checked "
        "(setting verify). The layers are read once and stay the same; the manifest, with another digest, is new. "
        "Of an index, all images get trees. Layers that have a tree are left out. Prints the digest of the new "
        "manifest or index."
    )
    parser.add_argument("image", metavar="IMAGE", help="an overlaybd image in a registry")
    parser.add_argument(
        "new", metavar="NEW", nargs="?", help="where the new manifest goes, in the same repository (default: IMAGE)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars, only the digest")
    add_json_option(parser)
    add_registry_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Add the trees; print the digest."""
    from contextlib import closing

    from obdlab.cli.progressbar import Bars
    from obdlab.convert.publish.addtrees import add_trees
    from obdlab.registry.reference import Reference

    reference = Reference.parse(args.image)
    target = Reference.parse(args.new or args.image)
    if target.digest is not None:
        remedy = command("image", "protect", "IMAGE", "NEW")
        raise ProtectError(f"{target}: the new manifest has another digest, so name a tag for it: {remedy}")
    with closing(registry_from(args)) as client:
        done = add_trees(client, reference, target, Bars(quiet=args.quiet or args.json))
    if args.json:
        print_json({"image": str(target), "digest": done.digest, "trees_made": done.made})
        return 0
    if not args.quiet:
        print(f"{done.made} hash trees made, stored as {target}", file=sys.stderr)
    print(done.digest)
    return 0
