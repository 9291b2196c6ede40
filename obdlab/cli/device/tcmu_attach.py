"""``obdlab device tcmu-attach`` and ``tcmu-detach``: TCMU devices, made and removed as overlaybd's tools do."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import need_root
from obdlab.cli.jsonoutput import add_json_option, answer
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def declare_attach(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Makes a device that a running `obdlab serve tcmu` or overlaybd-tcmu serves; prints the disk's node."
    )
    parser.add_argument("config", type=Path, help="the image's config.v1.json")
    parser.add_argument("--id", required=True, help="the device's id: a snapshot's, 13 letters or digits at most")
    parser.add_argument("--live-id", default="", metavar="ID", help="its id for live snapshots (with-devid)")
    parser.add_argument(
        "--iscsi",
        metavar="IQN",
        default="",
        help="export it over iSCSI under this name, in place of a disk here (no passwords: docs/how-to/tcmu.md)",
    )
    parser.add_argument(
        "--portal",
        action="append",
        metavar="ADDRESS:PORT",
        help="where the iSCSI target listens; repeatable (default: 127.0.0.1:3260)",
    )
    parser.add_argument(
        "--initiator",
        action="append",
        metavar="IQN",
        default=[],
        help="host that may log in (its name in its /etc/iscsi/initiatorname.iscsi); repeatable",
    )
    add_json_option(parser)
    parser.set_defaults(run=run_attach)


def declare_detach(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("id", help="its id")
    parser.set_defaults(run=run_detach)


def run_attach(args: argparse.Namespace) -> int:
    """Attach; print the node, or the name of the iSCSI target."""
    need_root("makes a block device")
    if args.iscsi:
        with _reason_of_failure(args.config):
            _export(args)
        answer(args, {"id": args.id, "iscsi": args.iscsi}, args.iscsi)
    else:
        node = attach(args.id, args.config, args.live_id)
        answer(args, {"id": args.id, "path": node}, node)
    return 0


def attach(device_id: str, config: Path, live_id: str = "") -> str:
    """Make a TCMU device and its disk; return the disk's node. Raises DeviceError with the daemon's reason."""
    need_root("makes a block device")
    from obdlab.devices.tcmu import configfs

    with _reason_of_failure(config):
        return str(configfs.attach(device_id, config, live_id=live_id))


@contextmanager
def _reason_of_failure(config: Path) -> Iterator[None]:
    from obdlab.server.tcmu.devconfig import failure_of, result_file

    if not config.is_file():
        raise DeviceError(f"{config}: no such file")
    result_file(config.absolute()).unlink(missing_ok=True)  # left by an earlier attempt
    try:
        yield
    except DeviceError as error:
        reason = failure_of(config.absolute())
        raise DeviceError(f"{error} ({reason})" if reason else str(error)) from error


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
