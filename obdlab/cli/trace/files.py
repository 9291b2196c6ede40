"""``obdlab trace files`` and ``transplant``: traces as files of their image."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_registry_options, add_runtime_options, settings_from
from obdlab.errors import FormatError
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from obdlab.layers.stack import Stack

_SHOWN = 10


def declare_files(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Lists the files of the image that the trace reads: bytes read, size, path; then the rest of it."
    )
    parser.add_argument("file", type=Path, metavar="TRACE", help="a trace or a priority list")
    parser.add_argument("image", metavar="IMAGE", help="the image it is of, as for attach")
    parser.add_argument("--reads", action="store_true", help="one line a read of the disk: offset, length, path")
    _add_common(parser)
    parser.set_defaults(run=run_files)


def declare_transplant(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Follows what was read from blocks to files in OLD, and from files to blocks in NEW, images with an ext4 "
        "or an EROFS. Files that NEW does not have are left out and told."
    )
    parser.add_argument("file", type=Path, metavar="TRACE", help="a trace or a priority list of OLD")
    parser.add_argument("old", metavar="OLD", help="the image it is of, as for attach")
    parser.add_argument("new", metavar="NEW", help="the image to make one for")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    _add_common(parser)
    parser.set_defaults(run=run_transplant)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_runtime_options(parser)
    add_registry_options(parser)


def run_files(args: argparse.Namespace) -> int:
    """List files, or reads."""
    from obdlab.traces.replay import load_file, reads_in
    from obdlab.traces.sectors import sectors_of_reads
    from obdlab.traces.transplant import files_of
    from obdlab.volumes.places import FilePlaces

    data = load_file(str(args.file))
    with opened([args.image], args) as disk:
        sectors = sectors_of_reads(reads_in(data, disk, name=str(args.file)), disk)
        if args.reads:
            for offset, length, path in FilePlaces(disk).pieces(sectors):
                print(f"{offset}\t{length}\t{name_of(path)}")
            return 0
        used = files_of(sectors, disk)
        for path, (size, whole) in used.files.items():
            print(f"{size:>12} {whole:>12} {name_of(path)}")
        print(f"{used.elsewhere:>12} {'':>12} (of the file system itself)")
    return 0


def run_transplant(args: argparse.Namespace) -> int:
    """Write the new trace, and print how much of the old one it holds."""
    from obdlab.cli.trace.sets import save_trace
    from obdlab.formats.lsmt.layout import SECTOR
    from obdlab.formats.trace import Trace
    from obdlab.traces.replay import load_file, reads_in, reads_of_disk
    from obdlab.traces.sectors import sectors_of_reads
    from obdlab.traces.sets import unique
    from obdlab.traces.transplant import transplant

    data = load_file(str(args.file))
    with opened([args.old], args) as old, opened([args.new], args) as new:
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
    save_trace(args.output, unique(Trace.from_reads(reads)))
    print(f"{share:.1f} % of {total} bytes of files found; {len(found.missing)} files missing", file=sys.stderr)
    for path in found.missing[:_SHOWN]:
        print(f"  {name_of(path)}", file=sys.stderr)
    if len(found.missing) > _SHOWN:
        print(f"  and {len(found.missing) - _SHOWN} more", file=sys.stderr)
    return 0


def name_of(path: bytes | None) -> str:
    """Return a path for people; "-" without one."""
    return "-" if path is None else printable(os.fsdecode(path or b"/"))


@contextmanager
def opened(source: Sequence[str], args: argparse.Namespace) -> Iterator[Stack]:
    """Open an image's read-only layers, without its writable one and without fetching ahead."""
    from dataclasses import replace

    from obdlab.cli.device.attach import image_config_of
    from obdlab.image.config import LowerConfig, UpperConfig
    from obdlab.image.open import Image, open_image

    config = replace(image_config_of(source, args), upper=UpperConfig(), result_file="", trace=LowerConfig())
    with open_image(config, settings_from(args), traces=False) as image:
        assert isinstance(image, Image)  # it has no upper
        yield image
