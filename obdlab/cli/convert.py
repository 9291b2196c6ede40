"""``obdlab convert``: an OCI image to an overlaybd image."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from obdlab.cli.common import (
    add_registry_options,
    platform,
    registry_from,
)
from obdlab.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obdlab.convert.image import ConvertedImage, ConvertOptions
    from obdlab.convert.platforms import ConvertedIndex
    from obdlab.convert.progress import Task
    from obdlab.formats.oci import Platform
    from obdlab.registry.client import RegistryClient

_ALL = "all"
_DESCRIPTION = """\
Convert an OCI image (gzip, zstd or plain tar layers) to an overlaybd image, layer by layer, and store it.

SRC and DST are registry references (host/name:tag) or OCI layout directories (oci:DIR[:TAG]).
Of a multi-platform image one platform is converted, this machine's unless --platform names another; "all" converts
every image of it and stores an index of them.
Needs no privileges: the file system is written in user space. The same image gives the same bytes everywhere."""


def add(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subcommands.add_parser(
        "convert",
        help="convert an OCI image to an overlaybd image",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="image to convert")
    parser.add_argument("destination", metavar="DST", help="where the converted image goes")
    parser.add_argument("--algorithm", choices=("lz4", "zstd"), default="lz4", help="default: %(default)s")
    parser.add_argument(
        "--block-size-kib",
        type=int,
        choices=(4, 8, 16, 32, 64),
        default=4,
        help="ZFile blocks (default: %(default)s)",
    )
    parser.add_argument(
        "--vsize-gib", type=_gib, default=64, metavar="N", help="size of the disk that holds the image (default: 64)"
    )
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]|all", type=_platform, help="default: this machine's")
    parser.add_argument(
        "--platforms-at-once", type=int, choices=range(1, 17), default=2, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--referrer", action="store_true", help="have the new manifest refer to the source (OCI 1.1 subject)"
    )
    parser.add_argument("--dump-manifest", type=Path, metavar="FILE", help="also write the new manifest to FILE")
    parser.add_argument("--docker", action="store_true", help="write docker's media types (default: OCI's)")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("/var/tmp"), help="where layers are built (default: %(default)s)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars and no table, only the digest")
    add_registry_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; print a table and the digest of the new manifest."""
    if args.docker and args.referrer:
        print("obdlab convert: --referrer needs OCI's media types: not with --docker", file=sys.stderr)
        return 2
    from obdlab.convert.source import check_apart

    check_apart(args.source, args.destination)
    client = registry_from(args)
    # A polite end also when told to or when the terminal goes (unless nohup had that ignored): devices and mounts are
    # taken down on the way out.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        converted = _convert(args, client)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        client.close()
    if not args.quiet:
        for image in converted.images:
            print_table(image)
    if args.dump_manifest is not None:
        _dump(args.dump_manifest, converted.document)
    print(converted.digest)
    return 0


def _convert(args: argparse.Namespace, client: RegistryClient) -> ConvertedIndex:
    from obdlab.convert.image import convert_image
    from obdlab.convert.platforms import ConvertedIndex, convert_platforms
    from obdlab.convert.source import open_destination, open_source

    source, destination = open_source(args.source, client), open_destination(args.destination, client)
    options, progress = _options(args), None if args.quiet else Bars()
    if args.platform == _ALL:
        return convert_platforms(
            source, destination, options=options, progress=progress, at_once=args.platforms_at_once
        )
    image = convert_image(source, destination, options=options, progress=progress)
    return ConvertedIndex(image.name, image.digest, image.document, (image,))


def _dump(path: Path, document: bytes) -> None:
    try:
        path.write_bytes(document)
    except OSError as error:
        raise SourceError(f"cannot write the manifest: {error.strerror}", blob=str(path)) from error


def print_table(image: ConvertedImage) -> None:
    """Print what each layer became, on standard error."""
    print(f"{'layer':<22}{'source':>10}{'blob':>10}{'on disk':>10}{'segments':>10}{'seconds':>9}", file=sys.stderr)
    for layer in image.layers:
        built = layer.built
        print(
            f"{layer.source_digest[:19]:<22}{_mb(layer.source_size):>10}{_mb(built.size):>10}"
            f"{_mb(built.data_size):>10}{built.segments:>10}{sum(built.seconds.values()):>9.2f}"
            f"{'' if layer.stored else '  (was there)'}",
            file=sys.stderr,
        )
    total = sum(layer.source_size for layer in image.layers)
    print(f"{'all':<22}{_mb(total):>10}{_mb(image.size):>10}{'':>20}{image.seconds:>9.2f}", file=sys.stderr)
    print(f"stored as {image.name}", file=sys.stderr)


def _options(args: argparse.Namespace) -> ConvertOptions:
    from obdlab.convert.image import ConvertOptions
    from obdlab.convert.layer import GIB, LayerOptions

    return ConvertOptions(
        layer=LayerOptions(args.algorithm, args.block_size_kib << 10, args.vsize_gib * GIB),
        platform=None if args.platform == _ALL else args.platform,
        referrer=args.referrer,
        docker=args.docker,
        work_dir=args.work_dir,
    )


class Bars:
    """Progress on a terminal: one bar for each task that is under way; the finished ones go."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        from tqdm import tqdm

        with tqdm(
            total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=None, file=sys.stderr
        ) as bar:
            yield _Bar(bar.update)


class _Bar:
    def __init__(self, update: Callable[[int], object]) -> None:
        self._update = update

    def advance(self, amount: int) -> None:
        self._update(amount)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _platform(text: str) -> Platform | str:
    return _ALL if text == _ALL else platform(text)


def _gib(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 16 << 10:
        raise argparse.ArgumentTypeError(f"not a size in GiB between 1 and 16384: {text!r}")
    return int(text)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
