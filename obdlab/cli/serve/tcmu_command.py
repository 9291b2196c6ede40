"""``obdlab serve tcmu``: serve overlaybd TCMU devices, in place of overlaybd-tcmu."""

from __future__ import annotations

import logging
import os
import signal
from typing import TYPE_CHECKING

from obdlab.cli import notify
from obdlab.cli.common import add_registry_options, add_runtime_options, need_root, settings_from
from obdlab.cli.logoptions import add_log_options, set_up_logs
from obdlab.observe import logs

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Serves the images of overlaybd devices in the kernel's TCMU: those that overlaybd-snapshotter, "
        "overlaybd-attacher or `obdlab device tcmu-attach` make, and those that it finds. Needs the kernel module "
        "target_core_user. Ends at SIGINT and SIGTERM; the devices stay, and wait for the next start."
    )
    add_runtime_options(parser)
    add_registry_options(parser)
    add_log_options(parser, default_file="standard error")
    parser.set_defaults(run=run, bounded=False)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    need_root("serves the kernel's block devices")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's BLAS would start threads, which a process that forks must not
    settings = settings_from(args)
    set_up_logs(args, logging.INFO, settings=settings)
    from obdlab.server.forking import Signals

    signals = Signals(signal.SIGINT, signal.SIGTERM)
    from obdlab.image import open as warm  # noqa: F401 - every server needs it; loaded once, here
    from obdlab.server.tcmu.daemon import TcmuDaemon

    daemon = TcmuDaemon(settings)
    logs.announce("obdlab tcmu: ready")
    notify.notify("READY=1", f"MAINPID={os.getpid()}")  # no watchdog: a process that forks has no thread to feed it
    daemon.run(signals)
    return 0
