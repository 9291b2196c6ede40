"""``obdlab layer zfile``: compress a file to a ZFile, extract or verify one."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, cast

from obdlab.cli.jsonoutput import add_json_option, print_json, report, say
from obdlab.cli.packing import (
    LayerArgumentsError,
    add_output_options,
    add_packing_options,
    end_politely_on_sigterm,
    packing_from,
    size_text,
)
from obdlab.cli.progressbar import progress_bar
from obdlab.errors import SourceError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

_STREAM = "-"


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command and its parts."""
    parser.description = "ZFiles are compressed block by block, so that they can be read at any place. - is a stream."
    parts = parser.add_subparsers(dest="part", metavar="WHAT", required=True)
    compress = parts.add_parser("compress", help="make a ZFile")
    compress.add_argument("source", metavar="SRC", help="file to compress, or -")
    compress.add_argument("output", metavar="DST", help="ZFile to make, or -")
    add_packing_options(compress, plain=False)
    compress.add_argument("--no-block-crcs", action="store_true", help="leave out the checksums of the blocks")
    compress.add_argument(
        "--keep-first-header",
        action="store_true",
        help="leave the header as a stream must, without the final values; readers then need the trailer",
    )
    add_output_options(compress)
    add_json_option(compress)
    compress.set_defaults(run=run_compress)
    extract = parts.add_parser("extract", help="write what a ZFile was made of")
    extract.add_argument("source", metavar="SRC", help="ZFile, perhaps in its tar, or -")
    extract.add_argument("output", metavar="DST", help="file to make, or -")
    add_output_options(extract)
    add_json_option(extract)
    extract.set_defaults(run=run_extract)
    verify = parts.add_parser("verify", help="read all of ZFiles, checking every checksum")
    verify.add_argument("sources", nargs="+", metavar="SRC", help="ZFile, perhaps in its tar")
    verify.add_argument("-q", "--quiet", action="store_true", help="only the exit status and errors")
    add_json_option(verify, "print the content's size of each as one JSON object")
    verify.set_defaults(run=run_verify)


def run_compress(args: argparse.Namespace) -> int:
    """Compress."""
    from obdlab.layerfiles.zfilemaking import compress_stream

    _check_stream(args)
    end_politely_on_sigterm()
    packing = packing_from(args, rewrite_header=not args.keep_first_header, block_crcs=not args.no_block_crcs)
    with (
        _input(args.source) as (source, size),
        _output(args) as output,
        progress_bar(args.source, size, quiet=args.quiet or args.json) as progress,
    ):
        length = compress_stream(source, output, packing, progress, name=args.output)
    if args.output != _STREAM:
        stored = os.path.getsize(args.output)
        facts = {"output": args.output, "data_size": length, "stored_size": stored}
        report(args, f"{args.output}: {size_text(length)} in {size_text(stored)}", facts)
    return 0


def run_extract(args: argparse.Namespace) -> int:
    """Extract."""
    from obdlab.image.open import open_zfile
    from obdlab.layerfiles.zfilemaking import extract

    _check_stream(args)
    end_politely_on_sigterm()
    with (
        _as_file(args.source) as path,
        open_zfile(path) as content,
        _output(args) as output,
        progress_bar(args.source, content.size, quiet=args.quiet or args.json) as progress,
    ):
        extract(content, output, sparse=args.output != _STREAM, progress=progress)
        size = content.size
    if args.json:
        print_json({"output": args.output, "data_size": size})
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Verify."""
    from obdlab.image.open import open_zfile
    from obdlab.layerfiles.description import content_size, verify

    sizes = {}
    for path in args.sources:
        open_zfile(path).close()  # refuses files that are no ZFiles
        with progress_bar(path, content_size(path), quiet=args.quiet or args.json) as progress:
            for length in verify(path):
                progress(length)
        sizes[path] = content_size(path)
        say(f"{path}: sound", quiet=args.quiet or args.json)
    if args.json:
        print_json(sizes)
    return 0


def _check_stream(args: argparse.Namespace) -> None:
    if args.json and args.output == _STREAM:
        raise LayerArgumentsError("--json and the ZFile's bytes both go to standard output: name a file")


@contextmanager
def _input(path: str) -> Iterator[tuple[BinaryIO, int]]:
    if path == _STREAM:
        yield sys.stdin.buffer, 0
        return
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise SourceError(f"cannot open ({error.strerror})", blob=path) from error
    with file:
        yield cast("BinaryIO", file), os.fstat(file.fileno()).st_size


@contextmanager
def _output(args: argparse.Namespace) -> Iterator[BinaryIO]:
    from obdlab.system.newfile import new_file

    if args.output != _STREAM:
        with new_file(args.output, force=args.force) as file:
            yield file
        return
    try:
        yield cast("BinaryIO", _Pipe(sys.stdout.buffer))
        sys.stdout.buffer.flush()
    except BrokenPipeError as error:
        # Otherwise the interpreter would report the error again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SourceError("its reader has ended", blob="standard output") from error


class _Pipe:
    # Standard output as a sink that cannot seek, even if it is a file: it may hold other data before ours.

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        return self._file.write(data)


@contextmanager
def _as_file(path: str) -> Iterator[str]:
    # A ZFile is read at random offsets, so one from a pipe is first stored in a file.
    if path != _STREAM:
        yield path
        return
    import shutil

    with tempfile.NamedTemporaryFile(prefix="obdlab-zfile-") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        file.flush()
        yield file.name
