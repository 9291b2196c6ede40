"""Options that the commands which write layer files share."""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from obdlab.errors import ObdlabError
from obdlab.formats.zfile import ALGORITHMS, DEFAULT_ALGORITHM, DEFAULT_BLOCK_SIZE

if TYPE_CHECKING:
    from obdlab.layerfiles.writing import Packing


class LayerArgumentsError(ObdlabError):
    """Arguments that contradict each other."""


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --force and --quiet for an output file."""
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no summary")


def add_packing_options(parser: argparse.ArgumentParser, *, plain: bool = True) -> None:
    """Add the options for storing the output; ``plain`` lets it be uncompressed."""
    group = parser.add_argument_group("how it is stored")
    add_compression_options(group, plain=plain)
    group.add_argument("--tar", action="store_true", help="put it into a tar, as registries want layers")
    group.add_argument(
        "--workers",
        type=int,
        choices=range(1, 65),
        metavar="N",
        default=min(4, os.cpu_count() or 1),
        help="threads that compress (LZ4 below 16 KiB: with compiled code only); same output (default: %(default)s)",
    )


def add_compression_options(parser: argparse._ActionsContainer, *, plain: bool = False) -> None:
    """Add algorithm and block size; ``plain`` lets it be uncompressed."""
    parser.add_argument(
        "--algorithm",
        choices=(*ALGORITHMS, "none") if plain else tuple(ALGORITHMS),
        default=DEFAULT_ALGORITHM,
        help="compression (default: %(default)s)",
    )
    parser.add_argument(
        "--block-size-kib",
        type=int,
        choices=(4, 8, 16, 32, 64),
        default=DEFAULT_BLOCK_SIZE >> 10,
        help="compressed blocks, KiB (default: %(default)s); in place of 64, 32 for a file with a block that "
        "does not compress, which the original could not read",
    )


def packing_from(args: argparse.Namespace, **more: bool) -> Packing:
    """Return the packing of these arguments."""
    from obdlab.layerfiles.writing import Packing

    algorithm = "" if args.algorithm == "none" else args.algorithm
    return Packing(algorithm, args.block_size_kib << 10, args.tar, args.workers, **more)


def add_layer_arguments(parser: argparse.ArgumentParser, data_help: str, *, metavar: str = "DATA") -> None:
    """Add the files of a writable layer: its data file, and after it its index file."""
    parser.add_argument("data", metavar=metavar, help=data_help)
    parser.add_argument(
        "index",
        nargs="?",
        default="",
        metavar="INDEX",
        help="its index file, if it is a writable layer in append mode that is not attached",
    )
    # Some commands of earlier versions took it in this way.
    parser.add_argument("--index", dest="index_option", default="", help=argparse.SUPPRESS)


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """The files of a layer. ``index`` is "" for a layer that is one file."""

    data: str
    index: str


def layer_files(args: argparse.Namespace) -> LayerFiles:
    """Return the files that these arguments name. Raises LayerArgumentsError if they name two index files."""
    if args.index and args.index_option:
        raise LayerArgumentsError(f"two index files (got {args.index} and --index {args.index_option}, wanted one)")
    return LayerFiles(args.data, args.index or args.index_option)


def end_politely_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does, so that half-made files are removed."""
    signal.signal(signal.SIGTERM, _interrupt)


def size_text(size: int) -> str:
    """Return a size for people: ``3.2 MiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def mb_text(size: int) -> str:
    """Return a size in decimal megabytes, as of data on the wire: ``3.4 MB``."""
    return f"{size / 1e6:.1f} MB"


def size_argument(text: str) -> int:
    """Read a size given on the command line: bytes, or a number with K, M, G or T."""
    digits, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    if not (digits.isascii() and digits.isdecimal()) or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"not a size (got {text!r}, wanted bytes, or a number with K, M, G or T)")
    return int(digits) * _UNITS[unit]


def uuid_argument(text: str) -> str:
    """Check a UUID given on the command line; any version, either case."""
    from obdlab.formats.lsmt.layout import normalise_uuid

    try:
        return normalise_uuid(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def message_argument(text: str) -> str:
    """Check a message given on the command line."""
    from obdlab.formats.lsmt.layout import encode_user_tag

    try:
        encode_user_tag(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
