"""``obdlab layer gzip-index``: make, describe or verify the index by which a gzip layer is read at any place."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from obdlab.cli.jsonoutput import add_json_option, answer, print_json, report, say
from obdlab.cli.numbers import whole
from obdlab.cli.packing import add_output_options, end_politely_on_sigterm, size_text
from obdlab.cli.progressbar import progress_bar

if TYPE_CHECKING:
    import argparse

_DESCRIPTION = """\
An index (gzip.meta of a turboOCI layer) lets a reader begin to inflate a gzip layer at about every MiB. The layer
itself stays as it is."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command and its parts."""
    parser.description = _DESCRIPTION
    parts = parser.add_subparsers(dest="part", metavar="WHAT", required=True)
    make = parts.add_parser("make", help="make the index of a gzip layer, equal to the original's")
    make.add_argument("layer", metavar="LAYER", help="gzip file")
    make.add_argument("output", metavar="INDEX", help="index to make")
    make.add_argument(
        "--span-kib",
        type=whole(64, 1 << 20),
        metavar="N",
        default=1024,
        help="content between two places, KiB, from 64 on; a place takes up to 32 KiB (default: %(default)s)",
    )
    make.add_argument(
        "--several-members",
        action="store_true",
        help="let the file have several gzip members (eStargz, bgzip); the original cannot read such an index",
    )
    add_output_options(make)
    add_json_option(make)
    make.set_defaults(run=run_make)
    inspect = parts.add_parser("inspect", help="describe an index")
    inspect.add_argument("index", metavar="INDEX", help="index")
    add_json_option(inspect)
    inspect.set_defaults(run=run_inspect)
    verify = parts.add_parser("verify", help="inflate a layer by its index, checking everything")
    verify.add_argument("layer", metavar="LAYER", help="gzip file")
    verify.add_argument("index", metavar="INDEX", help="its index")
    verify.add_argument("-q", "--quiet", action="store_true", help="only the exit status and errors")
    add_json_option(verify)
    verify.set_defaults(run=run_verify)


def run_make(args: argparse.Namespace) -> int:
    """Make an index."""
    from obdlab.layerfiles.gziplayers import make_index

    end_politely_on_sigterm()
    size = os.path.getsize(args.layer) if os.path.isfile(args.layer) else 0
    with progress_bar(args.layer, size, quiet=args.quiet or args.json) as progress:
        facts = make_index(
            args.layer,
            args.output,
            span=args.span_kib << 10,
            several=args.several_members,
            force=args.force,
            progress=progress,
        )
    places = f"{facts.entries} places in {size_text(facts.uncompressed_size)}"
    report(args, f"{args.output}: {places}, {size_text(facts.index_size)}", {"output": args.output, **asdict(facts)})
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Describe an index."""
    from obdlab.layerfiles.gziplayers import describe_index

    facts = describe_index(args.index)
    members = "several members" if facts.several_members else "one member"
    answer(
        args,
        asdict(facts),
        f"{args.index}: gzip index, version {facts.version} ({members})",
        f"  layer        {facts.compressed_size} bytes, {facts.uncompressed_size} uncompressed",
        f"  index        {facts.index_size} bytes, {facts.entries} places to begin",
        f"  between two  {facts.span} bytes of content as the aim, {facts.longest_span} at most",
    )
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Verify a layer and its index."""
    from obdlab.layerfiles.gziplayers import describe_index, verify_index

    facts = describe_index(args.index)
    with progress_bar(args.layer, facts.uncompressed_size, quiet=args.quiet or args.json) as progress:
        for length in verify_index(args.layer, args.index):
            progress(length)
    say(f"{args.layer}: sound, and {args.index} is its index", quiet=args.quiet or args.json)
    if args.json:
        print_json({"layer": args.layer, "index": args.index, "uncompressed_size": facts.uncompressed_size})
    return 0
