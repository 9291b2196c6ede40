"""``obdlab image pull-blob``: one manifest, config, layer or other blob of an image as a file."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from obdlab.cli.common import platform
from obdlab.cli.imageoptions import NAMES, add_image_options, image_client, opened_source
from obdlab.cli.jsonoutput import say
from obdlab.cli.packing import LayerArgumentsError, add_output_options, end_politely_on_sigterm, size_text
from obdlab.cli.progressbar import Bars

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

_STREAM = "-"
_MOST_DIGITS = 18
_DESCRIPTION = f"""\
Fetches one piece of an image, checks its digest, and writes it to a file that appears whole or not at all.
WHAT is "manifest" (default) or "config", those for this machine's platform; "index", the document that the name
stands for, an index or a manifest; the number of a layer, 0 being the lowest; or a digest: of any of these, and in a
registry of any blob of the repository. IMAGE@DIGEST alone is the blob or manifest of that digest.

{NAMES}"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("image", metavar="IMAGE[@DIGEST]", help="image, or repository and digest")
    parser.add_argument("what", nargs="?", metavar="WHAT", help="piece of it (default: manifest)")
    parser.add_argument("-o", "--output", default=_STREAM, metavar="FILE", help="file to make (default: -, a stream)")
    parser.add_argument(
        "--range",
        type=_range,
        metavar="BEGIN-END",
        help="only the bytes from BEGIN up to, and without, END (no END: to the last); their digest is not checked",
    )
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    add_output_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetch one piece."""
    from obdlab.convert.endpoints.contents import copy_piece, copy_range, find_piece, is_document
    from obdlab.registry.platform import host_platform

    end_politely_on_sigterm()
    image, what = _split(args)
    with image_client(args) as client, opened_source(image, client, args) as source:
        piece = find_piece(source, what, args.platform or host_platform())
        if args.output == _STREAM and sys.stdout.isatty() and not is_document(piece, what):
            raise LayerArgumentsError(f"{piece.digest} is binary ({piece.media_type}): give -o FILE")
        with _output(args) as sink:
            if args.range is None:
                copy_piece(source, piece, what, sink, Bars(quiet=args.quiet))
                note = f"{piece.digest}, checked"
            else:
                begin, end = args.range
                count = copy_range(source, piece, begin, end, sink)
                note = f"{size_text(count)} of {piece.digest}, not checked: a part has no digest"
    if args.output != _STREAM:
        say(f"{args.output}: {note}", quiet=args.quiet)
    return 0


# REPOSITORY@DIGEST: any blob of the repository, not only a manifest.
def _split(args: argparse.Namespace) -> tuple[str, str]:
    from obdlab.convert.endpoints.contents import MANIFEST
    from obdlab.convert.endpoints.forms import in_registry
    from obdlab.formats.oci import is_digest

    name, at, digest = args.image.rpartition("@")
    if args.what is not None or not at or not is_digest(digest):
        return args.image, args.what or MANIFEST
    return args.image if in_registry(name) else name, digest


@contextmanager
def _output(args: argparse.Namespace) -> Iterator[BinaryIO]:
    from obdlab.system.newfile import new_file

    with (
        nullcontext(sys.stdout.buffer) if args.output == _STREAM else new_file(args.output, force=args.force) as sink
    ):
        yield sink
        if args.output == _STREAM:
            sink.flush()


def _range(text: str) -> tuple[int, int | None]:
    begin, dash, end = text.partition("-")
    if not dash or not _is_number(begin) or not (end == "" or (_is_number(end) and int(begin) <= int(end))):
        raise argparse.ArgumentTypeError(f"wanted BEGIN-END or BEGIN-, in bytes (got {text!r})")
    return int(begin), int(end) if end else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS
