"""``obdlab image inspect``: describe layer files and images, and verify them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import platform
from obdlab.cli.image.inspect_image import faults_of, inspect_image, print_image
from obdlab.cli.imageoptions import NAMES, add_image_options
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.packing import size_text
from obdlab.cli.progressbar import progress_bar
from obdlab.errors import ObdlabError
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    from obdlab.convert.inspection import ImageFacts
    from obdlab.layerfiles.description import FileFacts, StackFacts

_DESCRIPTION = f"""\
Describes files and images.
Of a file: tar window, ZFile and LSMT header fields, sizes. Several sealed layers are also shown as the stack they
make, the first being the bottom.
Of an image: its layers with digests, sizes, compression and annotations, the file system, whether it has a hot layer,
the checksums of its bytes, and how much of it is in the block cache of this host; of a turboOCI image also whether
the ordinary layers with its files are there. --verify compares those with all that the image says of them, too.

{NAMES}"""
# Printed names of fields, where replacing underscores by blanks is not enough.
_TITLES = {
    "block_crcs": "block CRCs",
    "header_overwritten": "header holds index",
    "index_crc": "index CRC",
    "uuid": "UUID",
    "parent_uuid": "parent UUID",
    "user_tag": "message",
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "paths", nargs="+", metavar="NAME", help="LSMT layer, ZFile, or either in its tar; or an image"
    )
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    add_json_option(parser, "print JSON")
    parser.add_argument("--verify", action="store_true", help="also read everything and check every checksum")
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="block cache (default: the settings', or what devices use)"
    )
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Describe files and images, and verify them if asked. Prints the sound ones first, then the errors."""
    from obdlab.layerfiles.description import describe, describe_stack

    files: list[FileFacts] = []
    errors: list[str] = []
    names = [name for name in args.paths if _is_image(name)]
    paths = [path for name in args.paths if name not in names for path in _files(name, errors)]
    images = _images(names, args, errors)
    for path in paths:
        try:
            facts = describe(path)
            if args.verify:
                _verify(path)
        except ObdlabError as error:
            errors.append(str(error))
        else:
            files.append(facts)
    sealed = all(file.layer is not None and file.layer.segments is not None for file in files)
    stack = describe_stack(paths) if sealed and not errors and len(files) > 1 else None
    if args.json:
        _print_json(files, images, stack, errors, verified=args.verify)
    else:
        for image in images:
            print_image(image)
        for file in files:
            _print_file(file, verified=args.verify)
        if stack is not None:
            _print_stack(stack, files)
    for message in errors:
        print(f"{args.prog}: {printable(message)}", file=sys.stderr)
    return 1 if errors else 0


# Decided by the name alone, because importing the modules that read images takes a while.
def _is_image(name: str) -> bool:
    if Path(name).is_file():
        return False
    from obdlab.convert.endpoints.forms import names_image

    return names_image(name)


# The layer files of a config.v1.json; any other name is a file's own.
def _files(name: str, errors: list[str]) -> list[str]:
    from obdlab.cli.sources import is_config
    from obdlab.image.config import ConfigError, ImageConfig

    if not is_config(name):
        return [name]
    try:
        config = ImageConfig.load(name)
        files = [lower.local_file() for lower in config.lowers]
        if not files and not config.upper.active:
            raise ConfigError(f"{name}: names no layers (is it a config.v1.json?)")
        if None in files:
            raise ConfigError(f"{name}: has lowers in a registry: inspect the image by its name there")
    except ObdlabError as error:
        errors.append(str(error))
        return []
    return [*filter(None, files), *([config.upper.data] if config.upper.active else [])]


def _images(names: list[str], args: argparse.Namespace, errors: list[str]) -> list[ImageFacts]:
    if not names:
        return []
    from obdlab.cli.imageoptions import image_client

    images = []
    with image_client(args) as client:
        for name in names:
            try:
                image = inspect_image(name, client, args)
                images.append(image)
                errors += faults_of(image)
            except ObdlabError as error:
                errors.append(str(error))
    return images


def _verify(path: str) -> None:
    from obdlab.layerfiles.description import content_size, verify

    with progress_bar(path, content_size(path), quiet=False) as progress:
        for length in verify(path):
            progress(length)


def _print_json(
    files: list[FileFacts], images: list[ImageFacts], stack: StackFacts | None, errors: list[str], *, verified: bool
) -> None:
    document: dict[str, Any] = {"files": [asdict(file) for file in files]}
    if images:
        document["images"] = [asdict(image) for image in images]
    if verified and not errors:
        document["verified"] = True
    if stack is not None:
        document["stack"] = asdict(stack)
    if errors:
        document["errors"] = errors
    print_json(document, indent=2)


def _print_file(file: FileFacts, *, verified: bool) -> None:
    print(f"{file.path}: {_size(file.size)}")
    if file.tar is not None:
        _print_fields("tar", file.tar)
    if file.zfile is not None:
        _print_fields("ZFile", file.zfile)
    if file.layer is not None:
        _print_fields("LSMT", file.layer)
    if verified and file.zfile is not None and file.zfile.block_crcs:
        print(f"  verified: all {file.zfile.blocks} blocks match their CRC")
    elif verified:
        print("  verified: all of it can be read (it has no checksums)")


def _print_stack(stack: StackFacts, files: list[FileFacts]) -> None:
    print(f"stack of {stack.layers} layers: {_size(stack.virtual_size)} disk, {stack.segments} segments")
    for number in reversed(range(stack.layers)):
        note = "  (names another parent than the layer below)" if number in stack.broken_parent_links else ""
        print(f"  {number:3}  {_size(stack.visible_sizes[number]):>24} visible  {files[number].path}{note}")


def _print_fields(title: str, facts: Any) -> None:
    print(f"  {title}")
    for field in fields(facts):
        value = getattr(facts, field.name)
        if value is None or value == "":
            continue
        print(f"    {_TITLES.get(field.name, field.name.replace('_', ' ')):20} {_text(field.name, value)}")


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_flags"):
        return f"{value:#x}"
    if name.endswith("size"):
        return _size(value)
    return str(value)


def _size(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size} B ({size_text(size)})"
