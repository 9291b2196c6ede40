"""``obdlab serve exporter``: metrics and health of all devices, for Prometheus."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from dataclasses import replace

from obdlab.cli import notify
from obdlab.cli.common import add_runtime_options, settings_from
from obdlab.cli.logoptions import add_log_options, set_up_logs
from obdlab.cli.numbers import real
from obdlab.cli.signals import catch_signals
from obdlab.observe import logs

DEFAULT_LISTEN = "127.0.0.1:9863"
DEFAULT_PATH = "/metrics"
_SECONDS = real(above=0, below=86400)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Serve the metrics of a run directory (docs/reference/metrics.md) and, at /healthz, whether host, devices, "
        "registries and cache are well (503 if not). Ends at SIGINT and SIGTERM."
    )
    parser.add_argument(
        "--listen",
        type=address,
        default=DEFAULT_LISTEN,
        metavar="ADDRESS:PORT",
        help="where to answer (default: %(default)s; port 0: any that is free)",
    )
    parser.add_argument("--path", default=DEFAULT_PATH, help="path of the metrics (default: %(default)s)")
    parser.add_argument(
        "--hung-after",
        type=_SECONDS,
        default=10.0,
        metavar="S",
        help="requests under way for longer count as hung (default: %(default)g)",
    )
    parser.add_argument(
        "--deadline",
        type=_SECONDS,
        default=0.5,
        metavar="S",
        help="a device server that has not answered by then counts as hung (default: %(default)g)",
    )
    parser.add_argument("--end-with-parent", type=int, metavar="PID", help=argparse.SUPPRESS)
    add_runtime_options(parser)
    add_log_options(parser, default_level="warning")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from obdlab.metrics.exporter import Collected, ObdlabCollector
    from obdlab.metrics.health import health_of
    from obdlab.metrics.metricsserver import MetricsServer

    if args.end_with_parent:
        from obdlab.system.processes import end_with_parent

        if not end_with_parent(args.end_with_parent, signal.SIGTERM):
            return 0
    settings = settings_from(args)
    set_up_logs(args, logging.WARNING, settings=replace(settings, log_path=None))
    run_dir, cache_dir = args.run_dir.absolute(), settings.cache_dir
    collected = Collected(run_dir, deadline_s=args.deadline)
    collector = ObdlabCollector(collected, cache_dir, hung_after_s=args.hung_after)
    server = MetricsServer(
        args.listen, collector, lambda: health_of(run_dir, cache_dir, collected.look()), path=args.path
    )
    wait_for_signal = catch_signals()
    serving = threading.Thread(target=server.run, name="http", daemon=True)
    serving.start()
    host = f"[{args.listen[0]}]" if ":" in args.listen[0] else args.listen[0]
    logs.announce(f"obdlab exporter: ready on http://{host}:{server.port}{args.path}")
    if not args.end_with_parent:  # otherwise the parent notifies systemd
        notify.ready(serving.is_alive)
    wait_for_signal()
    if not args.end_with_parent:
        notify.stopping()
    server.stop()
    return 0


def address(text: str) -> tuple[str, int]:
    """Read the argument of an option that takes ADDRESS:PORT."""
    from obdlab.metrics.metricsserver import parse_address

    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
