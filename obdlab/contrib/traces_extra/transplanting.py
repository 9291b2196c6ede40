"""``obdlab trace transplant``: a trace of one image for another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options
from obdlab.cli.jsonoutput import add_json_option
from obdlab.cli.sources import add_source_options, opened_disk
from obdlab.cli.trace.files_command import name_of
from obdlab.errors import FormatError

if TYPE_CHECKING:
    import argparse

_SHOWN = 10


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Follows what was read from blocks to files in OLD, and from files to blocks in NEW, images with an ext4 "
        "or an EROFS. Files that NEW does not have are left out and listed."
    )
    parser.add_argument("file", type=Path, metavar="TRACE", help="a trace or a priority list of OLD")
    parser.add_argument("old", metavar="OLD", help="the image it is of, as for attach")
    parser.add_argument("new", metavar="NEW", help="the image to make one for")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    add_json_option(parser)
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the new trace, and print how much of the old one it holds."""
    from obdlab.cli.trace.sets_command import save_trace
    from obdlab.contrib.traces_extra.transplant import transplant
    from obdlab.formats.lsmt.layout import SECTOR
    from obdlab.formats.trace import Trace
    from obdlab.traces.replay import load_file, reads_in, reads_of_disk
    from obdlab.traces.sectors import sectors_of_reads
    from obdlab.traces.sets import unique

    data = load_file(str(args.file))
    with opened_disk([args.old], args) as old, opened_disk([args.new], args) as new:
        sectors = sectors_of_reads(reads_in(data, old, name=str(args.file)), old)
        found = transplant(sectors, old, new)
        reads = [
            read
            for begin, end in found.sectors
            for read in reads_of_disk(new, begin * SECTOR, (end - begin) * SECTOR)
        ]
    total = found.kept + found.lost
    share = 100 * found.kept / total if total else 0.0
    if not found.kept:
        raise FormatError(
            "nothing of the trace is in the new image", blob=str(args.file), got=f"{total} bytes of files"
        )
    missing = [name_of(path) for path in found.missing]
    save_trace(args, unique(Trace.from_reads(reads)), found_share=share / 100, missing=missing)
    if args.json:
        return 0
    print(f"{share:.1f} % of {total} bytes of files found; {len(found.missing)} files missing", file=sys.stderr)
    for path in found.missing[:_SHOWN]:
        print(f"  {name_of(path)}", file=sys.stderr)
    if len(found.missing) > _SHOWN:
        print(f"  and {len(found.missing) - _SHOWN} more", file=sys.stderr)
    return 0
