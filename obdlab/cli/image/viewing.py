"""Shared by ls, cat and cp: ``IMAGE:PATH``, and the files of that image."""

from __future__ import annotations

import argparse
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.cli.sources import SOURCE_HELP, add_source_options, opened_image
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.volumes.detect import FileTree

PATH_HELP = f"IMAGE:/PATH, where IMAGE is an {SOURCE_HELP.replace(' (separate arguments or joined by commas)', '')}, "
PATH_HELP += "joined by commas"


def image_path(text: str) -> tuple[str, bytes]:
    """Read the argument IMAGE:/PATH; without a path it means the root."""
    image, colon, path = text.rpartition(":/")
    if not colon:
        return text, b"/"
    if not image:
        raise argparse.ArgumentTypeError(f"wanted IMAGE:/PATH (got {text!r})")
    return image, b"/" + os.fsencode(path)


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the cache and for access to registries."""
    from pathlib import Path

    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="block cache (default: the settings', or what devices use)"
    )
    add_source_options(parser)


@contextmanager
def opened_tree(image: str, args: argparse.Namespace) -> Iterator[FileTree]:
    """Give the files of an image, for the block. Reads fetch only the bytes they need."""
    from obdlab.volumes.detect import FileTree

    with opened_image([image], args) as disk:
        yield FileTree(disk)


def shown(name: bytes) -> str:
    """Return a name for a terminal: all characters that are not printable are escaped."""
    return printable(name.decode(errors="backslashreplace"))
