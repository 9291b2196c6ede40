"""How images are converted, as options of a command."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import platform
from obdlab.cli.numbers import whole
from obdlab.cli.packing import add_compression_options, size_argument

if TYPE_CHECKING:
    from obdlab.convert.image import ConvertOptions
    from obdlab.formats.oci import Platform

ALL = "all"
_NONE = "none"
_OVERLAYBD, _TURBO = "overlaybd", "turbo-oci"
_BOTH = "both"
_MOST_PLATFORMS = 16
_DATABASE = "OBDLAB_CONVERT_DATABASE"


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of conversion."""
    parser.add_argument(
        "--as",
        dest="form",
        choices=(_OVERLAYBD, _TURBO),
        default=_OVERLAYBD,
        help="turbo-oci: files stay in SRC's layers, and small new layers point into them (default: %(default)s)",
    )
    parser.add_argument(
        "--fs",
        choices=("ext4", "erofs", _BOTH),
        default="ext4",
        help="file system of the image; both: only of turbo-oci, for snapshotters to choose (default: %(default)s)",
    )
    parser.add_argument(
        "--several-members",
        action="store_true",
        help="turbo-oci: also of layers with several gzip members (eStargz, bgzip), which the original cannot read",
    )
    parser.add_argument(
        "--zstd-layers",
        action="store_true",
        help="turbo-oci: also of zstd layers, for obdlab alone: the original refuses to open the image",
    )
    add_compression_options(parser)
    parser.add_argument(
        "--vsize-gib",
        type=whole(1, 16 << 10, "size in GiB"),
        default=64,
        metavar="N",
        help="size of the disk that holds the image (default: 64)",
    )
    parser.add_argument(
        "--bytes-per-inode",
        type=whole(1 << 10, 64 << 20, "number of bytes"),
        default=16384,
        metavar="N",
        help="ext4: one inode for so many bytes of the disk, as mkfs.ext4 -i (default: %(default)s)",
    )
    parser.add_argument(
        "--mount-options",
        default="",
        metavar="LIST",
        help="options that snapshotters mount the image's file system with (noatime,...)",
    )
    parser.add_argument(
        "--flatten",
        type=whole(1, 255, "number of layers"),
        default=0,
        metavar="N",
        help="at most N layers: the lowest N-1 are kept as they are, all above become one (default: keep all)",
    )
    parser.add_argument(
        "--base",
        nargs=2,
        metavar=("BASE", "CONVERTED"),
        help="take the layers of CONVERTED, an overlaybd image that was made of the image BASE by obdlab or by the "
        "original, for the lowest layers, which must be those of BASE",
    )
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]|all", type=_platform, help="default: this machine's")
    parser.add_argument(
        "--platforms-at-once",
        type=int,
        choices=range(1, _MOST_PLATFORMS + 1),
        metavar="N",
        help="default: 2, or what --memory allows",
    )
    parser.add_argument(
        "--memory", type=size_argument, metavar="SIZE", help="convert only as many platforms at once as this allows"
    )
    parser.add_argument(
        "--referrer", action="store_true", help="have the new manifest refer to the source (OCI 1.1 subject)"
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="add a hot layer of the likely reads of a start, by the image's configuration and by other starts "
        "(see: trace suggest)",
    )
    parser.add_argument(
        "--no-hash-trees",
        action="store_true",
        help="make no hash trees, by which lazy reads are checked (they are made for images in registries)",
    )
    parser.add_argument("--docker", action="store_true", help="write docker's media types (default: OCI's)")
    parser.add_argument(
        "--database",
        metavar="URL",
        help=(
            "database of converted layers, which are not converted again: a file (SQLite), postgresql://... or "
            f"mysql://..., or {_NONE} (default: ${_DATABASE}, or obdlab/converted.sqlite in ~/.cache)"
        ),
    )
    parser.add_argument(
        "--work-dir", type=Path, default=Path("/var/tmp"), help="where layers are built (default: %(default)s)"
    )


def conversion_options(args: argparse.Namespace) -> ConvertOptions:
    """Return the conversion options of these arguments."""
    from obdlab.convert.image import ConvertOptions
    from obdlab.convert.layer import GIB, LayerOptions

    filesystems = ("ext4", "erofs") if args.fs == _BOTH else (args.fs,)
    return ConvertOptions(
        layer=LayerOptions(
            args.algorithm, args.block_size_kib << 10, args.vsize_gib * GIB, filesystems[0], args.bytes_per_inode
        ),
        turbo=filesystems if args.form == _TURBO else (),
        several_members=args.several_members,
        zstd_layers=args.zstd_layers,
        platform=None if args.platform == ALL else args.platform,
        referrer=args.referrer,
        docker=args.docker,
        hash_trees=not args.no_hash_trees,
        flatten=args.flatten,
        mount_options=args.mount_options,
        database=_database(args.database),
        work_dir=args.work_dir,
    )


def platforms_at_once(args: argparse.Namespace) -> int:
    """Return how many platforms may be converted at the same time; at least one, also with too little memory."""
    from obdlab.convert.platforms import PLATFORM_MEMORY

    allowed = _MOST_PLATFORMS if args.memory is None else args.memory // PLATFORM_MEMORY
    wanted = args.platforms_at_once or (2 if args.memory is None else _MOST_PLATFORMS)
    return max(1, min(wanted, allowed))


def check_conversion_options(args: argparse.Namespace) -> str | None:
    """Return an error text if the arguments contradict each other."""
    if args.docker and args.referrer:
        return "--referrer needs OCI's media types: not with --docker"
    if args.suggest and args.referrer:
        return "--suggest is not possible with --referrer: an image with another layer on top refers to no source"
    if args.suggest and args.platform == ALL:
        return "--suggest is for one platform: not with --platform all"
    if args.suggest and args.fs == _BOTH:
        return "--suggest is for one file system: not with --fs both"
    if args.form != _TURBO and args.fs == _BOTH:
        return "--fs both needs --as turbo-oci: a layer of another image has one file system"
    if args.form != _TURBO and args.several_members:
        return "--several-members needs --as turbo-oci: other conversions take such layers without it"
    if args.form != _TURBO and args.zstd_layers:
        return "--zstd-layers needs --as turbo-oci: other conversions take zstd layers without it"
    if args.form == _TURBO and args.flatten:
        return "--flatten is not possible with --as turbo-oci: each layer points into one of the source's"
    if args.form == _TURBO and args.mount_options:
        return "--mount-options are not possible with --as turbo-oci: its layers have no place for them"
    if ";" in args.mount_options:
        return "--mount-options are separated by commas: no ';' in them"
    return None


def _database(named: str | None) -> str:
    from obdlab.convert.database import DatabaseError, open_database

    named = named or os.environ.get(_DATABASE)
    if named:
        return "" if named == _NONE else named
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(cache, "obdlab", "converted.sqlite")
    try:
        open_database(path).close()
    except DatabaseError as error:
        # No error: this default was not asked for, and the user may have no home directory.
        logging.getLogger(__name__).info("no database of converted layers: %s", error)
        return ""
    return path


def _platform(text: str) -> Platform | str:
    return ALL if text == ALL else platform(text)
