"""``obdlab layer create``: an empty writable layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.jsonoutput import add_json_option, report
from obdlab.cli.packing import (
    LayerArgumentsError,
    add_layer_arguments,
    layer_files,
    size_argument,
    size_text,
    uuid_argument,
)

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Makes the files of an empty writable layer: a data file and an index file in append mode, or with "
        "--sparse one sparse data file. They must not exist. The size of a layer over others may be 0: it "
        "then gets that of the layers below when it is stacked."
    )
    add_layer_arguments(parser, "data file to make")
    parser.add_argument(
        "--vsize",
        type=size_argument,
        required=True,
        metavar="SIZE",
        help="size of the disk in bytes, or as 512M, 64G, 1T",
    )
    parser.add_argument(
        "--sparse", action="store_true", help="one sparse file; the index file, if named, stays empty"
    )
    parser.add_argument(
        "--uuid", type=uuid_argument, metavar="UUID", help="UUID of the layer (default: a random one)"
    )
    parser.add_argument(
        "--parent-uuid", type=uuid_argument, metavar="UUID", help="UUID of the layer below (default: none)"
    )
    parser.add_argument(
        "--mkfs",
        action="store_true",
        help=(
            "make an empty ext4 in it, which grows while it is not mounted (resize --filesystem); for one that grows "
            "while it is, attach the layer and run mkfs.ext4"
        ),
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the files."""
    from obdlab.layers.append import AppendUpper
    from obdlab.layers.upper import SparseUpper

    files = layer_files(args)
    if not args.sparse and not files.index:
        raise LayerArgumentsError("a layer that is not sparse has an index file: give INDEX or --sparse")
    names = {"uuid": args.uuid, "parent_uuid": args.parent_uuid}
    if args.sparse:
        SparseUpper.create(files.data, args.vsize, index_path=files.index or None, **names).close()
    else:
        AppendUpper.create(files.data, files.index, args.vsize, **names).close()
    if args.mkfs:
        _make_filesystem(files.data, files.index)
    report(
        args,
        f"{files.data}: empty writable layer of a disk of {size_text(args.vsize)}",
        {"data": files.data, "index": files.index, "size": args.vsize},
    )
    return 0


def _make_filesystem(data: str, index: str) -> None:
    from obdlab.layers.stack import WritableStack
    from obdlab.layers.upper import open_upper
    from obdlab.volumes.ext4.editor import Editor
    from obdlab.volumes.ext4.layout import ROOT_INO, Inode
    from obdlab.volumes.ext4.mkfs import make_filesystem

    try:
        with WritableStack(None, open_upper(data, index)) as disk:
            make_filesystem(disk)
            # e2fsck wants lost+found in a file system that is written.
            editor = Editor(disk)
            editor.add(ROOT_INO, b"lost+found", Inode(mode=0o40700, links=2))
            editor.finish()
            disk.flush()
    except BaseException:
        for made in filter(None, (data, index)):
            Path(made).unlink()
        raise
