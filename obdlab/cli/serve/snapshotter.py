"""``obdlab serve snapshotter``: serve containerd's snapshots API in the foreground."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from obdlab.cli import notify
from obdlab.cli.common import add_device_option, add_registry_options, add_runtime_options, need_root, settings_from
from obdlab.cli.logoptions import add_log_options, log_settings, set_up_logs
from obdlab.cli.signals import catch_signals
from obdlab.observe import logs

if TYPE_CHECKING:
    import argparse

    from obdlab.differ.filling import DifferOptions
    from obdlab.server.snapshottersocket import Telling
    from obdlab.settings.settings import Settings
    from obdlab.snapshotter.config import SnapshotterConfig
    from obdlab.snapshotter.core import Snapshotter
    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.startrecording import RecordedStart

_GRACE_S = 10.0


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Serve containerd's snapshots API: plain OCI images as the built-in overlayfs snapshotter does, "
        "overlaybd images as lazily read block devices. Ends at SIGINT and SIGTERM; containers keep running."
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="state directory, made if need be")
    parser.add_argument("--address", type=Path, metavar="SOCKET", help="unix socket to answer on")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON with the keys of overlaybd-snapshotter's config.json; options given here win over it",
    )
    parser.add_argument(
        "--exporter",
        metavar="ADDRESS:PORT",
        help="also run an exporter there: metrics for Prometheus, and a health check (as by: exporter)",
    )
    add_device_option(parser, daemon=True)
    add_runtime_options(parser)
    add_log_options(parser, default_level="warning, or what -v and --config say")
    add_registry_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    need_root("makes block devices and mounts file systems")
    from obdlab.differ.diffservice import SERVICE as DIFF
    from obdlab.differ.diffservice import DiffService
    from obdlab.server.tcmu.devices import devices_for
    from obdlab.snapshotter.config import ConfigError, SnapshotterConfig
    from obdlab.snapshotter.core import Snapshotter
    from obdlab.snapshotter.imagemounts import ImageDevices
    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.service import SnapshotServer

    config = SnapshotterConfig() if args.config is None else SnapshotterConfig.load(args.config)
    root, address = args.root or config.root, args.address or config.address
    if root is None or address is None:
        raise ConfigError("both --root and --address are wanted, here or in the --config file")
    settings = replace(settings_from(args), **log_settings(args))
    set_up_logs(args, logging.getLogger().level, settings=settings)
    if config.log_level is not None and not args.verbose and args.log_level is None:
        logging.getLogger().setLevel(config.log_level)
    hosts = config.images.plain_http_hosts | frozenset(args.plain_http)
    wait_for_signal = catch_signals()
    devices = devices_for(args.run_dir, settings)
    devices.check_place()  # or every container would fail later, on a service that is ready
    layout = Layout(root)
    images = ImageDevices(layout, devices)
    snapshotter = Snapshotter(layout, images, replace(config.images, plain_http_hosts=hosts))
    snapshotter.starts.publish = partial(_publish_start, settings, hosts)
    differ = DiffService(snapshotter, devices, _differ_options(config))
    server = SnapshotServer(snapshotter, address.absolute(), [(DIFF, differ)])
    server.start()
    images.start_host()
    publisher = _publish_counters(args.run_dir.absolute(), layout, snapshotter)
    if config.exporter_listen and not args.exporter:
        settings = replace(settings, exporter_listen=config.exporter_listen, exporter_path=config.exporter_path)
    exporter, api = _start_exporter(args, settings), _start_snapshot_api(args, settings)
    forkserver = _start_forkserver(args.run_dir) if settings.prefork_pulls else None
    logs.announce(f"obdlab snapshotter: ready on {server.address}")
    notify.ready()
    wait_for_signal()
    notify.stopping()
    if forkserver is not None:
        forkserver.terminate()  # not its forks, which are commands
    if publisher is not None:
        publisher.close()
    for beside in filter(None, (exporter, api)):
        beside.terminate()
        with suppress(subprocess.TimeoutExpired):
            beside.wait(_GRACE_S)
    if not server.stop(_GRACE_S):
        # A normal exit would wait for an attach whose registry does not answer. That attach changes nothing of ours
        # any more, and the device host finishes it.
        logging.getLogger(__name__).warning("ending while a call still waits for its device")
        logging.shutdown()
        os._exit(0)
    snapshotter.close()
    return 0


# The registry decides whether this host may push; an image that has got a trace meanwhile keeps that.
def _publish_start(settings: Settings, plain_http_hosts: frozenset[str], start: RecordedStart) -> None:
    from contextlib import closing

    from obdlab.convert.endpoints.registryimages import RegistrySource
    from obdlab.convert.publish.hot_and_traces import attach_trace
    from obdlab.image.registryaccess import open_client
    from obdlab.registry.platform import host_platform
    from obdlab.traces.replay import load_file

    logger = logging.getLogger(__name__)
    with closing(open_client(settings, plain_http_hosts=plain_http_hosts)) as client:
        source = RegistrySource(start.reference, client)
        found, manifest = source.find(host_platform(), overlaybd=True)
        if tuple(layer.digest for layer in manifest.layers) != start.layers:
            logger.warning("%s: is another image now, the trace of its start is not published", start.reference)
        elif source.trace(found.digest) is None:
            image = start.reference.with_digest(found.digest)
            digest = attach_trace(client, image, load_file(str(start.path)), settings, platform=None)
            logger.info("%s: the trace of its start is published as %s", start.reference, digest)


def _differ_options(config: SnapshotterConfig) -> DifferOptions:
    from obdlab.differ.filling import DifferOptions

    standard = DifferOptions()
    return DifferOptions(str(config.containerd or standard.containerd), config.convert_layers)


# Times and failures of calls, for exporters. The snapshotter runs also if they cannot be published.
def _publish_counters(run_dir: Path, layout: Layout, snapshotter: Snapshotter) -> Telling | None:
    from obdlab.observe.counters import counted
    from obdlab.server.snapshottersocket import SNAPSHOTS, Telling

    def table() -> dict[str, dict[str, float]]:
        return counted() | {SNAPSHOTS: {kind: float(count) for kind, count in snapshotter.counts().items()}}

    try:
        return Telling(run_dir, layout.short_name, table)
    except OSError as error:
        logging.getLogger(__name__).warning("no counters for exporters: %s", error)
        return None


# It ends with the pipe, however this process ends.
def _start_forkserver(run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "obdlab.cli.prefork.forkserver", str(run_dir.absolute())]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


# The exporter is a process of its own: it answers also while this one is busy, and a scrape takes none of this
# process's time.
def _start_exporter(args: argparse.Namespace, settings: Settings) -> subprocess.Popen[bytes] | None:
    listen = args.exporter or settings.exporter_listen
    if not listen:
        return None
    words = ["--listen", listen, "--path", settings.exporter_path, "--cache-dir", str(settings.cache_dir)]
    return _start_beside("exporter", args, [*words, "--log-format", settings.log_format])


# It asks device servers alone, and never this process.
def _start_snapshot_api(args: argparse.Namespace, settings: Settings) -> subprocess.Popen[bytes] | None:
    if not settings.snapshot_api:
        return None
    words = ["--address", settings.snapshot_api_address] if settings.snapshot_api_address else []
    words += ["--open"] if settings.snapshot_api_open else []
    return _start_beside("snapshot-api", args, words, output=sys.stderr)


# It ends with this process, also if that is killed.
def _start_beside(
    service: str, args: argparse.Namespace, words: list[str], *, output: IO[str] | None = None
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "obdlab.cli.main", "serve", service, "--end-with-parent", str(os.getpid())]
    command += ["--run-dir", str(args.run_dir.absolute()), *words]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output)
