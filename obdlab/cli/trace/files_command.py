"""``obdlab trace files``: a trace as files of its image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.sources import add_source_options, opened_disk
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse


def declare_files(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Lists the files of the image that the trace reads: bytes read, size, path; then the rest of it."
    )
    parser.add_argument("file", type=Path, metavar="TRACE", help="a trace or a priority list")
    parser.add_argument("image", metavar="IMAGE", help="the image it is of, as for attach")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--reads", action="store_true", help="one line a read of the disk: offset, length, path")
    add_json_option(form, "one JSON object")
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run_files)


def run_files(args: argparse.Namespace) -> int:
    """List files, or reads."""
    from obdlab.traces.replay import load_file, reads_in
    from obdlab.traces.sectors import sectors_of_reads
    from obdlab.volumes.places import FilePlaces, files_of

    data = load_file(str(args.file))
    with opened_disk([args.image], args) as disk:
        sectors = sectors_of_reads(reads_in(data, disk, name=str(args.file)), disk)
        if args.reads:
            for offset, length, path in FilePlaces(disk).pieces(sectors):
                print(f"{offset}\t{length}\t{name_of(path)}")
            return 0
        used = files_of(sectors, disk)
        if args.json:
            files = [
                {"path": os.fsdecode(path), "read": size, "size": whole} for path, (size, whole) in used.files.items()
            ]
            print_json({"files": files, "elsewhere": used.elsewhere})
            return 0
        for path, (size, whole) in used.files.items():
            print(f"{size:>12} {whole:>12} {name_of(path)}")
        print(f"{used.elsewhere:>12} {'':>12} (of the file system itself)")
    return 0


def name_of(path: bytes | None) -> str:
    """Return a path for people; "-" without one."""
    return "-" if path is None else printable(os.fsdecode(path or b"/"))
