"""``obdlab image pull``: pull an image's metadata; the snapshotter fetches its data when they are read."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_registry_options, platform
from obdlab.cli.imageoptions import add_tls_options, image_client
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.cli.progressbar import shown_bar
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from obdlab.cli.progressbar import Bar
    from obdlab.pull.rpull import PullResult
    from obdlab.registry.reference import Reference


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Make an image runnable by containerd without downloading what the snapshotter can fetch "
        "on demand. Plain images are pulled as usual."
    )
    parser.add_argument("reference", metavar="REF", help="image, such as registry.example/name:tag")
    parser.add_argument("--snapshotter", default=os.environ.get("CONTAINERD_SNAPSHOTTER", "obdlab"))
    parser.add_argument("--platform", metavar="OS/ARCH[/VARIANT]", type=platform, help="default: this machine's")
    parser.add_argument(
        "--download-blobs",
        action="store_true",
        help="fetch the blobs of overlaybd layers too, and the layers that turboOCI images read: the image then runs "
        "without its registry, and other programs can copy, save and push an overlaybd image",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no summary")
    add_json_option(parser, "print what was pulled as JSON, in place of the summary")
    group = parser.add_argument_group("containerd")
    group.add_argument(
        "--address",
        default=os.environ.get("CONTAINERD_ADDRESS", "/run/containerd/containerd.sock"),
        help="its socket (default: $CONTAINERD_ADDRESS or %(default)s)",
    )
    group.add_argument(
        "-n",
        "--namespace",
        default=os.environ.get("CONTAINERD_NAMESPACE", "default"),
        help="(default: $CONTAINERD_NAMESPACE or %(default)s)",
    )
    add_registry_options(parser)
    add_tls_options(parser, "TLS (wins over the settings file)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from obdlab.containerd.client import Containerd
    from obdlab.pull.rpull import rpull
    from obdlab.registry.platform import host_platform
    from obdlab.registry.reference import Reference

    # SIGTERM, from a service manager or timeout(1), must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    reference = Reference.parse(args.reference)
    with (
        shown_bar("layers", 0, quiet=args.quiet, delay=0.2) as bar,
        image_client(args) as registry,
        Containerd(args.address.removeprefix("unix://"), args.namespace) as containerd,
    ):
        result = rpull(
            containerd,
            registry,
            reference,
            snapshotter=args.snapshotter,
            platform=args.platform or host_platform(),
            progress=_Downloads(bar),
            download=args.download_blobs,
        )
    if args.json:
        print_json(_as_dict(result, time.monotonic() - began), indent=2)
    elif not args.quiet:
        print(_summary(result, time.monotonic() - began))
    for line in _warnings(result, reference, download=args.download_blobs):
        print(f"{args.prog}: {printable(line)}", file=sys.stderr)
    return 0


def _warnings(result: PullResult, reference: Reference, *, download: bool) -> Iterator[str]:
    from obdlab.registry.reference import Reference

    lazy = result.still_lazy
    change = "to change that, remove the images that have them and their containers, and pull again"
    if download and lazy:
        yield (
            f"{len(lazy)} of {len(result.layers)} layers were pulled lazily before, and containers go on reading "
            f"them from the registry; {change}"
        )
    other = [layer.origin for layer in lazy if Reference.parse(layer.origin).host != reference.host]
    trees = sum(layer.other_tree for layer in result.layers)
    if trees:
        yield (
            f"{trees} of {len(result.layers)} layers were pulled before with another hash tree than this image's, or "
            f"without one, by which containers go on checking them; {change}"
        )
    if other:
        yield (
            f"{len(other)} of {len(result.layers)} layers were pulled before as part of {other[0]}, and containers "
            f"go on reading them from there; {change}"
        )


def _as_dict(result: PullResult, elapsed_s: float) -> dict[str, Any]:
    return {
        "name": result.name,
        "digest": result.digest,
        "metadata_bytes": result.metadata_bytes,
        "layer_bytes": result.layer_bytes,
        "seconds": round(elapsed_s, 3),
        "layers": [asdict(layer) | {"outcome": layer.outcome.value} for layer in result.layers],
    }


def _summary(result: PullResult, elapsed_s: float) -> str:
    from obdlab.pull.unpack import Outcome

    total = sum(layer.size for layer in result.layers)
    counts = [(result.count(outcome), outcome.value) for outcome in (Outcome.LAZY, Outcome.UNPACKED, Outcome.PRESENT)]
    layers = ", ".join(f"{count} {word}" for count, word in counts if count)
    return (
        f"{result.name} {result.digest}\n"
        f"{len(result.layers)} layer{'' if len(result.layers) == 1 else 's'} ({total / 1e6:.1f} MB): {layers}; "
        f"fetched {result.fetched_bytes / 1e6:.3f} MB in {elapsed_s:.2f} s"
    )


# One bar for all downloads; it appears with the first one.
class _Downloads:
    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def expect(self, size: int) -> None:
        self._bar.total = (self._bar.total or 0) + size
        self._bar.refresh()

    def advance(self, size: int) -> None:
        self._bar.update(size)
