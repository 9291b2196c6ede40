"""``obdlab image convert``: an OCI image to an overlaybd image."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from obdlab.cli.image.convertoptions import (
    ALL,
    add_conversion_options,
    check_conversion_options,
    conversion_options,
    platforms_at_once,
)
from obdlab.cli.imageoptions import NAMES, add_image_options, image_client, opened_destination, opened_source
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.packing import mb_text
from obdlab.cli.progressbar import Bars
from obdlab.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.convert.base import Base
    from obdlab.convert.image import ConvertedImage, ConvertedLayer
    from obdlab.convert.platforms import ConvertedIndex
    from obdlab.registry.client import RegistryClient

_DESCRIPTION = f"""\
Convert an OCI image (gzip, zstd or plain tar layers) to an overlaybd image, layer by layer, and store it.

{NAMES}

Of a multi-platform image one platform is converted, this machine's unless --platform names another; "all" converts
every image of it and stores an index of them.
--suggest adds a layer of the likely reads of a start, without running one.
--as turbo-oci makes small layers that point into those of SRC, in the same repository, where SRC must stay.
Needs no privileges: the file system is written in user space. The same image gives the same bytes everywhere."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", help="image to convert")
    parser.add_argument("destination", metavar="DST", help="where the converted image goes")
    add_conversion_options(parser)
    parser.add_argument("--dump-manifest", type=Path, metavar="FILE", help="also write the new manifest to FILE")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars and no table, only the digest")
    add_json_option(parser, "print what was made as JSON, in place of table and digest")
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; print a table and the digest of the new manifest."""
    wrong = check_conversion_options(args)
    if wrong is not None:
        print(f"{args.prog}: {wrong}", file=sys.stderr)
        return 2
    from obdlab.convert.endpoints.names import check_apart

    check_apart(args.source, args.destination)
    # SIGTERM and the loss of the terminal (unless nohup ignores SIGHUP) also end the command through its cleanup,
    # which takes devices and mounts down.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        with image_client(args) as client:
            converted = convert(args, client)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if args.dump_manifest is not None:
        _dump(args.dump_manifest, converted.document)
    if args.json:
        print_json(_as_dict(converted), indent=2)
    elif not args.quiet:
        for image in converted.images:
            print_table(image)
    if any(image.is_turbo for image in converted.images):
        print(_place_of_files(args), file=sys.stderr)  # also with --quiet: forgotten, it costs the image
    if not args.json:
        print(converted.digest)
    return 0


def convert(args: argparse.Namespace, client: RegistryClient) -> ConvertedIndex:
    """Convert the image or images that the arguments name. Raises ObdlabError."""
    from obdlab.convert.image import convert_image
    from obdlab.convert.platforms import ConvertedIndex, convert_platforms

    options, progress = conversion_options(args), Bars(quiet=args.quiet)
    with (
        opened_source(args.source, client, args) as source,
        opened_destination(args.destination, client, args) as destination,
        _opened_base(args, client) as base,
    ):
        options = replace(options, base=base)
        if args.platform == ALL:
            return convert_platforms(
                source, destination, options=options, progress=progress, at_once=platforms_at_once(args)
            )
        image = convert_image(source, destination, options=options, progress=progress)
    converted = ConvertedIndex(image.name, image.digest, image.document, (image,))
    return _with_suggested(args, client, converted) if args.suggest else converted


# The new image gets its layer in its place: it is read as any other, from where it is now.
def _with_suggested(args: argparse.Namespace, client: RegistryClient, converted: ConvertedIndex) -> ConvertedIndex:
    from obdlab.cli.common import settings_from
    from obdlab.convert.publish.extend import manifest_of
    from obdlab.convert.publish.suggested import add_suggested_layer
    from obdlab.traces.profile import own_profile

    with (
        opened_source(args.destination, client, args) as source,
        opened_destination(args.destination, client, args) as destination,
    ):
        added = add_suggested_layer(
            source,
            destination,
            settings_from(args),
            own_profile(),
            client=client,
            platform=args.platform,
            work_dir=args.work_dir,
            progress=Bars(quiet=args.quiet),
        )
    if added is None:
        print(f"{args.prog}: {args.destination}: no start is known of it, and no hot layer added", file=sys.stderr)
        return converted
    if not (args.quiet or args.json):
        print(f"hot layer of {mb_text(added.size)}: {added.files} files that a start likely reads", file=sys.stderr)
    with opened_source(args.destination, client, args) as source:
        document = manifest_of(source, args.platform).to_bytes()
    return replace(converted, digest=added.manifest.digest, document=document)


@contextmanager
def _opened_base(args: argparse.Namespace, client: RegistryClient) -> Iterator[Base | None]:
    from obdlab.convert.base import Base

    if args.base is None:
        yield None
        return
    with (
        opened_source(args.base[0], client, args) as original,
        opened_source(args.base[1], client, args) as converted,
    ):
        yield Base(original, converted)


def _as_dict(converted: ConvertedIndex) -> dict[str, Any]:
    return {
        "name": converted.name,
        "digest": converted.digest,
        "images": [
            {
                "digest": image.digest,
                "platform": asdict(image.platform),
                "size": image.size,
                "seconds": round(image.seconds, 3),
                "layers": [_layer_dict(layer) for layer in image.layers],
            }
            for image in converted.images
        ],
    }


def _layer_dict(layer: ConvertedLayer) -> dict[str, Any]:
    built = layer.built
    return {
        "source_digest": layer.source_digest,
        "source_layers": layer.merged,
        "source_size": layer.source_size,
        "digest": built.digest,
        "size": built.size,
        "data_size": built.data_size,
        "segments": built.segments,
        "stored": layer.stored,
        "reused": layer.reused,
        "seconds": {phase: round(seconds, 3) for phase, seconds in built.seconds.items()},
    }


# No manifest of a turboOCI image lists its targets, so that a garbage collection by manifests does not see their use.
def _place_of_files(args: argparse.Namespace) -> str:
    from obdlab.convert.endpoints.forms import CONTAINERD, REGISTRY, split_transport

    transport, _ = split_transport(args.destination)
    if transport == CONTAINERD:
        return "its files are in the layers of the source, which containerd keeps as long as this image"
    if transport == REGISTRY:
        return (
            f"its files stay in the layers of {args.source}: keep that image, with its tag, or the registry's "
            "garbage collection may delete them"
        )
    return "its files are in the source's layers, which are beside it now, but in no manifest: copy or keep all of it"


def _dump(path: Path, document: bytes) -> None:
    try:
        path.write_bytes(document)
    except OSError as error:
        raise SourceError(f"cannot write the manifest: {error.strerror}", blob=str(path)) from error


def print_table(image: ConvertedImage) -> None:
    """Print the new layers on standard error."""
    print(f"{'layer':<22}{'source':>10}{'blob':>10}{'on disk':>10}{'segments':>10}{'seconds':>9}", file=sys.stderr)
    for layer in image.layers:
        built = layer.built
        print(
            f"{layer.source_digest[:19]:<22}{mb_text(layer.source_size):>10}{mb_text(built.size):>10}"
            f"{mb_text(built.data_size) if built.segments else '':>10}{built.segments or '':>10}"
            f"{sum(built.seconds.values()):>9.2f}"
            f"{_note(layer)}",
            file=sys.stderr,
        )
    total = sum(layer.source_size for layer in image.layers)
    print(
        f"{'all':<22}{mb_text(total):>10}{mb_text(image.size):>10}{'':>20}{image.seconds:>9.2f}",
        file=sys.stderr,
    )
    print(f"stored as {image.name}", file=sys.stderr)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _note(layer: ConvertedLayer) -> str:
    notes = [f"{layer.merged} layers"] if layer.merged > 1 else []
    if layer.reused or not layer.stored:
        notes.append(layer.reused or "was there")
    return f"  ({', '.join(notes)})" if notes else ""
