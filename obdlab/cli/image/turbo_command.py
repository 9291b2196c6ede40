"""``obdlab image turbo``: an image that containerd has, as one that starts from containerd's content store."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import platform
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.sources import add_containerd_option
from obdlab.command import command
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from obdlab.convert.image import ConvertedImage

_SUFFIX = "-turbo"
_FILE_SYSTEMS = {"ext4": ("ext4",), "erofs": ("erofs",), "both": ("ext4", "erofs")}


class TurboArgumentError(ObdlabError):
    """The arguments do not name two images of the same namespace in containerd."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"""\
Make a turboOCI image of an image that containerd has, and unpack it for the snapshotter: containers then start from
the ordinary layers in containerd's content store. No registry is read or written.

example: an image from an archive, run by the snapshotter
  ctr images import app.tar
  {command("image", "turbo", "containerd:registry.example/app:1")}
  ctr run --rm --snapshotter obdlab registry.example/app:1{_SUFFIX} app"""
    parser.add_argument("source", metavar="SRC", help="containerd:[NAMESPACE:]NAME, an ordinary image")
    parser.add_argument(
        "destination",
        metavar="DST",
        nargs="?",
        help=f"containerd:[NAMESPACE:]NAME, in the same namespace (default: SRC{_SUFFIX})",
    )
    parser.add_argument(
        "--fs", choices=tuple(_FILE_SYSTEMS), default="ext4", help="file system of the image (default: %(default)s)"
    )
    parser.add_argument(
        "--several-members", action="store_true", help="also of layers with several gzip members (eStargz, bgzip)"
    )
    parser.add_argument("--zstd-layers", action="store_true", help="also of zstd layers")
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    parser.add_argument("--snapshotter", default=os.environ.get("CONTAINERD_SNAPSHOTTER", "obdlab"))
    parser.add_argument("--no-unpack", action="store_true", help="only store the image")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("/var/tmp"), help="where layers are built (default: %(default)s)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars and no table, only the digest")
    add_json_option(parser, "print what was made as JSON, in place of table and digest")
    add_containerd_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the image, unpack it, print its digest."""
    from obdlab.cli.image.convert import print_table
    from obdlab.containerd.client import Containerd
    from obdlab.pull.stored import unpack_stored
    from obdlab.registry.platform import host_platform

    namespace, source = _in_containerd(args.source)
    other, new = _in_containerd(args.destination or f"{args.source.partition('@')[0]}{_SUFFIX}")
    if other != namespace:
        raise TurboArgumentError(f"another namespace (got {other!r}, wanted {namespace!r}, which has the files)")
    if new == source:
        raise TurboArgumentError("the new image would replace its source (wanted another name)")
    address = args.containerd.removeprefix("unix://")
    image = _convert(args, address, namespace, source, new)
    layers = []
    if not args.no_unpack:
        with Containerd(address, namespace) as containerd:
            wanted = args.platform or host_platform()
            made = unpack_stored(containerd, new, snapshotter=args.snapshotter, platform=wanted)
        layers = [asdict(layer) | {"outcome": layer.outcome.value} for layer in made]
    if args.json:
        print_json({"name": new, "digest": image.digest, "size": image.size, "unpacked": layers}, indent=2)
        return 0
    if not args.quiet:
        print_table(image)
        print(f"containers read its files from containerd's content store, as {new}", file=sys.stderr)
    print(image.digest)
    return 0


def _convert(args: argparse.Namespace, address: str, namespace: str, source: str, new: str) -> ConvertedImage:
    from obdlab.cli.progressbar import Bars
    from obdlab.convert.endpoints.containerdimages import ContainerdDestination, ContainerdSource
    from obdlab.convert.image import ConvertOptions, convert_image

    options = ConvertOptions(
        turbo=_FILE_SYSTEMS[args.fs],
        several_members=args.several_members,
        zstd_layers=args.zstd_layers,
        platform=args.platform,
        work_dir=args.work_dir,
    )
    with (
        closing(ContainerdSource(address, namespace, source)) as original,
        closing(ContainerdDestination(address, namespace, new)) as destination,
    ):
        progress = Bars(quiet=args.quiet or args.json)
        return convert_image(original, destination, options=options, progress=progress)


def _in_containerd(text: str) -> tuple[str, str]:
    from obdlab.convert.endpoints.forms import CONTAINERD, split_namespace, split_transport

    transport, rest = split_transport(text)
    if transport != CONTAINERD:
        raise TurboArgumentError(
            f"{text}: not an image of containerd's (wanted containerd:[NAMESPACE:]NAME; for others: "
            f"{command('image', 'convert')} --as turbo-oci)"
        )
    return split_namespace(text, rest)
