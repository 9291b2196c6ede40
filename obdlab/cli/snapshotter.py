"""``obdlab snapshotter``: serve containerd's snapshots API in the foreground."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_registry_options, add_runtime_options, device_service_from

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_GRACE_S = 10.0


def add(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subcommands.add_parser(
        "snapshotter",
        help="serve containerd as a proxy snapshotter",
        description=(
            "Serve containerd's snapshots API: plain OCI images as the built-in overlayfs snapshotter does, "
            "overlaybd images as lazily read block devices. Ends at SIGINT and SIGTERM; containers keep running."
        ),
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="state directory, made if need be")
    parser.add_argument("--address", type=Path, metavar="SOCKET", help="unix socket to answer on")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON with the keys of overlaybd-snapshotter's config.json; options given here win over it",
    )
    add_runtime_options(parser)
    add_registry_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from obdlab.snapshotter.config import ConfigError, SnapshotterConfig
    from obdlab.snapshotter.core import Snapshotter
    from obdlab.snapshotter.images import ImageDevices
    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.service import SnapshotServer

    config = SnapshotterConfig() if args.config is None else SnapshotterConfig.load(args.config)
    root, address = args.root or config.root, args.address or config.address
    if root is None or address is None:
        raise ConfigError("both --root and --address are wanted, here or in the --config file")
    if config.log_level is not None and not args.verbose:
        logging.getLogger().setLevel(config.log_level)
    hosts = config.images.plain_http_hosts | frozenset(args.plain_http)
    wait_for_signal = _catch_signals()
    layout = Layout(root)
    images = ImageDevices(layout, device_service_from(args), start_host_early=True)
    snapshotter = Snapshotter(layout, images, replace(config.images, plain_http_hosts=hosts))
    server = SnapshotServer(snapshotter, address.absolute())
    server.start()
    print(f"obdlab snapshotter: ready on {server.address}", flush=True)
    wait_for_signal()
    if not server.stop(_GRACE_S):
        # Leaving the usual way would wait for the attach of a registry that does not answer. It changes nothing of
        # ours any more, and the device host brings it to its end.
        logging.getLogger(__name__).warning("ending while a call still waits for its device")
        logging.shutdown()
        os._exit(0)
    snapshotter.close()
    return 0


# A pipe, because an Event deadlocks if the signal comes while the main thread is inside its wait(), and the device
# host would inherit the mask that sigwait needs.
def _catch_signals() -> Callable[[], None]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        os.read(reader, 1)

    return wait
