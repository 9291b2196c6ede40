"""``obdlab layer apply``: one layer's tar onto the writable layer of an image configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_registry_options, add_runtime_options, settings_from
from obdlab.cli.jsonoutput import add_json_option, answer

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Applies a layer's tar, with its whiteouts, to the ext4 of the image in CONFIG, whose writable layer (upper) "
        "takes the changes; the layers below may be in a registry. The file system is written in user space, without "
        "a device or a mount. After a failure the writable layer is half changed: make it again."
    )
    parser.add_argument("layer", metavar="LAYER", help="a tar, plain or compressed by gzip or zstd, or a pipe")
    parser.add_argument("config", metavar="CONFIG", type=Path, help="config.v1.json of an image that is not attached")
    parser.add_argument("--mkfs", action="store_true", help="make an empty ext4 before")
    parser.add_argument(
        "--diff-id", metavar="DIGEST", default="", help="digest that the uncompressed tar must have, sha256:..."
    )
    add_json_option(parser)
    add_runtime_options(parser)
    add_registry_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Apply; print counts."""
    from obdlab.convert.decompress import checked
    from obdlab.convert.ontoconfig import apply_to_config, opened_tar

    with opened_tar(args.layer) as tar:
        pieces = checked(tar, args.layer, args.diff_id) if args.diff_id else tar
        done = apply_to_config(pieces, args.layer, args.config, settings_from(args), mkfs=args.mkfs)
    facts = {"members": done.members, "file_bytes": done.file_bytes, "whiteouts": done.whiteouts}
    text = f"{args.layer}: {done.members} members, {done.file_bytes} bytes of files, {done.whiteouts} paths removed"
    answer(args, facts, text)
    return 0
