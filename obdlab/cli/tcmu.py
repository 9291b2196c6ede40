"""``obdlab tcmu``: serve overlaybd TCMU devices, and attach them as overlaybd's tools do."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli import notify
from obdlab.cli.common import add_registry_options, add_runtime_options, need_root, settings_from
from obdlab.cli.logoptions import add_log_options, set_up_logs
from obdlab.errors import DeviceError
from obdlab.observe import logs

if TYPE_CHECKING:
    import argparse


def add(subcommands: Any) -> None:
    """Declare the commands."""
    parser = subcommands.add_parser(
        "tcmu",
        help="serve overlaybd TCMU devices, in place of overlaybd-tcmu",
        description=(
            "Serves the images of overlaybd devices in the kernel's TCMU: those that overlaybd-snapshotter, "
            "overlaybd-attacher or `obdlab tcmu-attach` make, and those that it finds. Needs the kernel module "
            "target_core_user. Ends at SIGINT and SIGTERM; the devices stay, and wait for the next start."
        ),
    )
    add_runtime_options(parser)
    add_registry_options(parser)
    add_log_options(parser, default_file="standard error")
    parser.set_defaults(run=run, bounded=False)

    attach = subcommands.add_parser(
        "tcmu-attach",
        help="attach an image as overlaybd-attacher does",
        description="Makes a device that a running `obdlab tcmu` or overlaybd-tcmu serves; prints the disk's node.",
    )
    attach.add_argument("config", type=Path, help="the image's config.v1.json")
    attach.add_argument("--id", required=True, help="the device's id: a snapshot's, 13 letters or digits at most")
    attach.add_argument("--live-id", default="", metavar="ID", help="its id for live snapshots (with-devid)")
    attach.add_argument(
        "--iscsi",
        metavar="IQN",
        default="",
        help="export it over iSCSI under this name, in place of a disk here (no passwords: docs/how-to/tcmu.md)",
    )
    attach.add_argument(
        "--portal",
        action="append",
        metavar="ADDRESS:PORT",
        help="where the iSCSI target listens; repeatable (default: 127.0.0.1:3260)",
    )
    attach.add_argument(
        "--initiator",
        action="append",
        metavar="IQN",
        default=[],
        help="who may log in to it (the name in /etc/iscsi/initiatorname.iscsi there); repeatable",
    )
    attach.set_defaults(run=run_attach)

    detach = subcommands.add_parser("tcmu-detach", help="take such a device away again")
    detach.add_argument("id", help="its id")
    detach.set_defaults(run=run_detach)


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


def run_attach(args: argparse.Namespace) -> int:
    """Attach; print the node, or the name of the iSCSI target."""
    need_root("makes a block device")
    from obdlab.devices.tcmu import configfs
    from obdlab.server.tcmu.devconfig import failure_of, result_file

    if not args.config.is_file():
        raise DeviceError(f"{args.config}: no such file")
    result_file(args.config.absolute()).unlink(missing_ok=True)  # left by an earlier attempt
    try:
        if args.iscsi:
            _export(args)
            print(args.iscsi)
        else:
            print(configfs.attach(args.id, args.config, live_id=args.live_id))
    except DeviceError as error:
        reason = failure_of(args.config.absolute())
        raise DeviceError(f"{error} ({reason})" if reason else str(error)) from error
    return 0


def _export(args: argparse.Namespace) -> None:
    from obdlab.devices.tcmu import configfs, iscsi

    target = configfs.Target.of(args.id)
    configfs.create(target, configfs.dev_config_of(args.config, args.live_id))
    try:
        iscsi.export(target, args.iscsi, args.portal or ["127.0.0.1:3260"], args.initiator)
    except BaseException:
        configfs.remove(target)
        raise


def run_detach(args: argparse.Namespace) -> int:
    """Detach."""
    need_root("removes a block device")
    from obdlab.devices.tcmu import configfs
    from obdlab.server.tcmu.devices import take_down

    target = configfs.Target.of(args.id)
    there = target.backstore.exists() or target.loop.exists()
    take_down(target)
    if not there:
        raise DeviceError(f"{args.id}: no such TCMU device")
    return 0
