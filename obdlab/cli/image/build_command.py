"""``obdlab image build``: an image by a Dockerfile, on a lazily read base."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from obdlab.cli.common import (
    add_device_option,
    add_runtime_options,
    device_service_from,
    need_root,
    platform,
    registry_from,
)
from obdlab.cli.imageoptions import NAMES, opened_destination
from obdlab.cli.jsonoutput import add_json_option, print_json, say
from obdlab.cli.packing import mb_text, size_argument
from obdlab.cli.progressbar import Bars
from obdlab.cli.sources import add_source_options
from obdlab.errors import ObdlabError
from obdlab.formats.zfile import ALGORITHMS

if TYPE_CHECKING:
    from obdlab.build.dockerfile import Dockerfile
    from obdlab.build.imagebuild import BuildOptions, BuiltImage

_DESCRIPTION = f"""\
Build an image by a Dockerfile and store it as IMAGE. Its base is an overlaybd image in a registry, of which only the
blocks that the steps read are fetched. Each step's changes become one overlaybd layer, which is packed and stored
while the next steps run. Must be run as root, with runc installed.

{NAMES}

Instructions: FROM, RUN, COPY, ADD (local files), ENV, ARG, WORKDIR, USER, SHELL, LABEL, EXPOSE, VOLUME, ENTRYPOINT,
CMD, HEALTHCHECK, STOPSIGNAL, MAINTAINER. Others, and flags that are not supported, are refused by file and line."""
_DEFAULT_CACHE = Path("/var/lib/obdlab/build")


class BuildUsageError(ObdlabError):
    """The arguments do not fit each other, or name a file that cannot be read."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "context", type=Path, metavar="CONTEXT", help="directory with the files that COPY and ADD take"
    )
    parser.add_argument("-t", "--tag", required=True, metavar="IMAGE", help="where the new image goes")
    parser.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="the Dockerfile (default: CONTEXT/Dockerfile)"
    )
    parser.add_argument("--target", default="", metavar="STAGE", help="build this stage (default: the last)")
    parser.add_argument(
        "--build-arg",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="value of an ARG (without: that of the environment); repeatable",
    )
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="id=ID,src=FILE",
        help="file for RUN --mount=type=secret,id=ID; never stored in a layer; repeatable",
    )
    parser.add_argument(
        "--network",
        choices=("none", "host"),
        default="none",
        help="network of RUN: a loopback alone, or the host's (default: none)",
    )
    parser.add_argument("--no-cache", action="store_true", help="run all steps, also those with a layer in the cache")
    parser.add_argument(
        "--build-cache",
        type=Path,
        default=_DEFAULT_CACHE,
        metavar="DIR",
        help="layers of earlier builds (default: %(default)s)",
    )
    parser.add_argument(
        "--build-cache-quota",
        type=size_argument,
        default=10 << 30,
        metavar="SIZE",
        help="their most bytes (default: 10G)",
    )
    parser.add_argument("--algorithm", choices=tuple(ALGORITHMS), default="lz4", help="of new layers (default: lz4)")
    parser.add_argument(
        "--vsize",
        type=size_argument,
        default=64 << 30,
        metavar="SIZE",
        help="disk of an image from scratch (default: 64G)",
    )
    parser.add_argument("--no-hash-trees", action="store_true", help="make no hash trees for the new layers")
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("/var/tmp"), help="where layers are written (default: %(default)s)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no output of the steps, only the digest")
    add_json_option(parser, "print steps, sizes and seconds as JSON, in place of the digest")
    add_device_option(parser)
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run, bounded=False)


def run(args: argparse.Namespace) -> int:
    """Build; print the digest of the new manifest."""
    need_root("makes devices, mounts and containers")
    # Their usual end would leave mounts and devices behind.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        image = _build(args)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if args.json:
        print_json(_as_dict(image), indent=2)
        return 0
    say(
        f"{image.name}: {image.new_layers} new layers of {mb_text(image.new_size)}, "
        f"{image.seconds['total']:.1f} s, "
        f"{mb_text(image.base_read)} read of the base's {mb_text(image.base_size)}",
        quiet=args.quiet,
    )
    print(image.descriptor.digest)
    return 0


def _build(args: argparse.Namespace) -> BuiltImage:
    from obdlab.build.copying import Tree
    from obdlab.build.ignorefile import Ignored
    from obdlab.build.imagebuild import build_image
    from obdlab.build.inside import Inside
    from obdlab.build.stages import unused_arguments

    file, options = _dockerfile(args), _options(args)
    for name in unused_arguments(file, options.steps.arguments):
        print(f"--build-arg {name}: no ARG of this name", file=sys.stderr)
    with ExitStack() as opened:
        context = opened.enter_context(Inside(args.context))
        client = opened.enter_context(closing(registry_from(args)))
        quiet = args.quiet or args.json
        output = opened.enter_context(open(os.devnull, "wb")).fileno() if quiet else sys.stderr.fileno()
        return build_image(
            file,
            Tree(context, Ignored.parse(_ignore_file(args, context))),
            opened.enter_context(opened_destination(args.tag, client, args)),
            client,
            device_service_from(args),
            options,
            output=output,
            say=lambda text: say(text, quiet=quiet),
            progress=Bars(quiet=quiet),
        )


def _dockerfile(args: argparse.Namespace) -> Dockerfile:
    from obdlab.build.dockerfile import MOST_BYTES, parse

    if not args.context.is_dir():
        raise BuildUsageError(f"{args.context}: not a directory, so no build context")
    path = args.file or args.context / "Dockerfile"
    return parse(_content(path, MOST_BYTES), path.name)


# Beside a Dockerfile of another name, FILE.dockerignore wins, as for Docker.
def _ignore_file(args: argparse.Namespace, context: Any) -> bytes:
    from obdlab.build.ignorefile import MOST_BYTES, NAME

    if args.file is not None:
        own = args.file.with_name(f"{args.file.name}{NAME}")
        if own.is_file():
            return _content(own, MOST_BYTES)
    found: bytes = context.read_small(NAME.encode(), MOST_BYTES)
    return found


def _content(path: Path, most: int) -> bytes:
    from obdlab.localfile import read_regular

    try:
        return read_regular(path, most)
    except OSError as error:
        raise BuildUsageError(f"{path}: cannot be read ({error.strerror or error})") from error


def _options(args: argparse.Namespace) -> BuildOptions:
    from datetime import UTC, datetime

    from obdlab.build.imagebuild import BuildOptions
    from obdlab.build.stagebuild import Options
    from obdlab.layerfiles.writing import Packing

    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch and not (epoch.isascii() and epoch.isdecimal() and len(epoch) < 12):
        raise BuildUsageError(f"$SOURCE_DATE_EPOCH: wanted seconds since 1970 (got {epoch[:40]!r})")
    created = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    steps = Options(
        arguments=dict(map(_argument, args.build_arg)),
        network=args.network,
        secrets=dict(map(_secret, args.secret)),
        use_cache=not args.no_cache,
    )
    return BuildOptions(
        steps=steps,
        target=args.target,
        platform=args.platform,
        packing=Packing(args.algorithm, tar=True),
        virtual_size=args.vsize,
        hash_trees=not args.no_hash_trees,
        created=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        work_dir=args.work_dir,
        cache_dir=args.build_cache.absolute(),
        cache_quota=args.build_cache_quota,
    )


def _argument(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or (not equals and name not in os.environ):
        raise BuildUsageError(f"--build-arg {text}: no value (wanted NAME=VALUE, or NAME in the environment)")
    return name, value if equals else os.environ[name]


def _secret(text: str) -> tuple[str, Path]:
    values = dict(part.partition("=")[::2] for part in text.split(","))
    path = values.get("src") or values.get("source") or ""
    if set(values) - {"id", "src", "source", "type"} or not values.get("id") or values.get("type", "file") != "file":
        raise BuildUsageError(f"--secret {text}: wanted id=ID,src=FILE")
    if not Path(path).is_file():
        raise BuildUsageError(f"--secret {text}: no such file ({path!r})")
    return values["id"], Path(path).absolute()


def _as_dict(image: BuiltImage) -> dict[str, Any]:
    return {
        "name": image.name,
        "digest": image.descriptor.digest,
        "layers": image.layers,
        "new_layers": image.new_layers,
        "new_size": image.new_size,
        "base_size": image.base_size,
        "base_read": image.base_read,
        "steps": [asdict(step) for step in image.steps],
        "seconds": {phase: round(seconds, 3) for phase, seconds in image.seconds.items()},
    }


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
