"""``obdlab trace files``: a trace as files of its image."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_registry_options, add_runtime_options, settings_from
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from obdlab.layers.stack import Stack


def declare_files(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Lists the files of the image that the trace reads: bytes read, size, path; then the rest of it."
    )
    parser.add_argument("file", type=Path, metavar="TRACE", help="a trace or a priority list")
    parser.add_argument("image", metavar="IMAGE", help="the image it is of, as for attach")
    parser.add_argument("--reads", action="store_true", help="one line a read of the disk: offset, length, path")
    add_runtime_options(parser)
    add_registry_options(parser)
    parser.set_defaults(run=run_files)


def run_files(args: argparse.Namespace) -> int:
    """List files, or reads."""
    from obdlab.traces.replay import load_file, reads_in
    from obdlab.traces.sectors import sectors_of_reads
    from obdlab.volumes.places import FilePlaces, files_of

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
