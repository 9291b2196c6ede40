"""``obdlab image publish``: publish a trace with its image in a registry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_registry_options, add_runtime_options, platform, registry_from, settings_from
from obdlab.cli.jsonoutput import add_json_option, answer, print_json
from obdlab.cli.numbers import whole
from obdlab.cli.packing import mb_text
from obdlab.cli.sources import add_source_options
from obdlab.errors import ObdlabError
from obdlab.formats.zfile import ALGORITHMS

if TYPE_CHECKING:
    import argparse

_FORMS = _HOT, _ORDERED, _ACCELERATION, _REFERRER = "hot-layer", "ordered-layers", "acceleration-layer", "referrer"


class PublishError(ObdlabError):
    """The options contradict each other."""


def declare_publish(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "hot-layer: NEW is the image with one more small layer, which holds the blocks of the trace in the order of "
        "use, so that a start fetches them at once. acceleration-layer: NEW is the image with the trace itself as a "
        "layer, as the original makes it. ordered-layers: as acceleration-layer, and every layer is written again "
        "with the blocks of the trace at its front, in the order of use. referrer: the image stays as it is, and the "
        "trace is stored in the registry as an artifact that refers to the image; obdlab device attach and mount ask "
        "for it. FILE may be a priority list as well."
    )
    parser.add_argument("image", metavar="IMAGE", help="an overlaybd image; for referrer in a registry")
    parser.add_argument("new", metavar="NEW", nargs="?", help="where the new image goes (not for referrer)")
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="a trace, or a priority list")
    parser.add_argument(
        "--as",
        dest="form",
        choices=_FORMS,
        default=_HOT,
        help="default: %(default)s",
    )
    parser.add_argument(
        "--algorithm", choices=tuple(ALGORITHMS), default="zstd", help="of a hot layer (default: zstd)"
    )
    parser.add_argument(
        "--block-size-kib", type=int, choices=(4, 8, 16, 32), default=32, help="of a hot layer (default: 32)"
    )
    parser.add_argument(
        "--level", type=whole(1, 19), metavar="N", help="of a hot layer's zstd: 1 (fast) to 19 (small) (default: 19)"
    )
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp"), help="default: %(default)s")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars, only the digest")
    add_json_option(parser)
    add_runtime_options(parser)
    add_source_options(parser)
    parser.set_defaults(run=run)


def declare_unpublish(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Removes all traces that refer to IMAGE; prints the digests of their artifacts."
    parser.add_argument("image", metavar="IMAGE", help="an overlaybd image in a registry")
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    add_json_option(parser)
    add_registry_options(parser)
    parser.set_defaults(run=run_undo)


def run(args: argparse.Namespace) -> int:
    """Publish; print the digest of the new manifest."""
    from obdlab.traces.replay import load_file

    if (args.new is None) != (args.form == _REFERRER):
        wanted = "IMAGE alone" if args.form == _REFERRER else "IMAGE and NEW"
        raise PublishError(f"--as {args.form} wants {wanted}")
    if args.level and (args.form, args.algorithm) != (_HOT, "zstd"):
        raise PublishError("--level is for hot layers in zstd")
    trace = load_file(str(args.trace))
    client = registry_from(args)
    try:
        digest = _attach(args, client, trace) if args.form == _REFERRER else _extend(args, client, trace)
    finally:
        client.close()
    if args.json:
        print_json({"digest": digest})
    else:
        print(digest)
    return 0


def run_undo(args: argparse.Namespace) -> int:
    """Remove published traces from an image."""
    from contextlib import closing

    from obdlab.convert.publish.hot_and_traces import detach_traces
    from obdlab.registry.reference import Reference

    with closing(registry_from(args)) as client:
        gone = detach_traces(client, Reference.parse(args.image), platform=args.platform)
    answer(args, {"removed": gone}, *gone or ["no trace refers to it"])
    return 0


def _attach(args: argparse.Namespace, client: Any, trace: bytes) -> str:
    from obdlab.convert.publish.hot_and_traces import attach_trace
    from obdlab.registry.reference import Reference

    reference = Reference.parse(args.image)
    settings = settings_from(args)
    return attach_trace(client, reference, trace, settings, platform=args.platform, trace_name=str(args.trace))


def _extend(args: argparse.Namespace, client: Any, trace: bytes) -> str:
    from contextlib import closing
    from dataclasses import replace

    from obdlab.cli.progressbar import Bars
    from obdlab.convert.endpoints.names import check_apart, open_destination, open_source
    from obdlab.convert.publish.hot_and_traces import HOT_PACKING, add_acceleration_layer, add_hot_layer

    check_apart(args.image, args.new)
    place = {"containerd": args.containerd}
    common = {"client": client, "platform": args.platform, "work_dir": args.work_dir, "trace_name": str(args.trace)}
    common["progress"] = Bars(quiet=args.quiet or args.json)
    settings = settings_from(args)
    with (
        closing(open_source(args.image, client, **place)) as source,
        closing(open_destination(args.new, client, **place)) as target,
    ):
        if args.form == _ORDERED:
            from obdlab.convert.publish.ordered import order_layers

            _, trace = order_layers(
                source, target, trace, **{key: value for key, value in common.items() if key != "client"}
            )
            with closing(open_source(args.new, client, **place)) as made:
                return add_acceleration_layer(made, target, trace, settings, **common).digest
        if args.form == _ACCELERATION:
            return add_acceleration_layer(source, target, trace, settings, **common).digest
        packing = replace(HOT_PACKING, algorithm=args.algorithm, block_size=args.block_size_kib << 10)
        if args.level:
            packing = replace(packing, level=args.level)
        descriptor, size = add_hot_layer(source, target, trace, settings, packing=packing, **common)
        if not (args.quiet or args.json):
            print(f"hot layer of {mb_text(size)}, stored as {target.name}", file=sys.stderr)
        return descriptor.digest
