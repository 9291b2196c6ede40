"""What ls, cat and cp share: ``IMAGE:PATH`` and the files of the image it names."""

from __future__ import annotations

import argparse
import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from obdlab.cli.attach import SOURCE_HELP, image_config_of
from obdlab.cli.common import add_registry_options, settings_from
from obdlab.cli.packing import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.image.filetree import FileTree

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
    """Add where the cache and the registry's credentials are."""
    from pathlib import Path

    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="block cache (default: the settings', or what devices use)"
    )
    add_registry_options(parser)


@contextmanager
def opened_tree(image: str, args: argparse.Namespace) -> Iterator[FileTree]:
    """Open an image for as long as its files are looked at. What is read of it is fetched, and no more."""
    from obdlab.image.filetree import FileTree
    from obdlab.image.open import open_image

    config = image_config_of([image], args)
    # Looking leaves no trace: neither a recording nor the result of opening it.
    config = replace(config, result_file="", record_trace_path="")
    with open_image(config, settings_from(args), traces=False) as disk:
        yield FileTree(disk)


def shown(name: bytes) -> str:
    """Return a name for people: what a terminal would take as more than text is escaped."""
    return printable(name.decode(errors="backslashreplace"))
