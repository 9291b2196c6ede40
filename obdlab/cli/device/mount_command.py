"""``obdlab device mount`` and ``umount``: an overlaybd image as a read-only directory, without containerd."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import (
    add_runtime_options,
    device_service_from,
)
from obdlab.cli.device.attach import LEAST_ATTACH_S, add_attach_options
from obdlab.cli.jsonoutput import add_json_option, answer
from obdlab.cli.sources import SOURCE_HELP, config_of, forget_config
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    import argparse

    from obdlab.server.client import AttachedDevice, DeviceService


def declare_mount(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Mounts an overlaybd image. Reads fetch the blocks that they need, and cache them. Set-user-ID programs and "
        "device files of the image have no effect on this host (nosuid, nodev)."
    )
    parser.add_argument("source", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("target", type=Path, metavar="DIR", help="where to mount; made if it does not exist")
    add_json_option(parser, "print id, node and directory as one JSON object")
    add_attach_options(parser)
    parser.set_defaults(run=run_mount)


def declare_umount(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("target", type=Path, metavar="DIR")
    add_json_option(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run_umount)


def run_mount(args: argparse.Namespace) -> int:
    """Attach the image and mount it. A failure leaves neither device nor mount."""
    from obdlab.system.mount import is_mounted

    if is_mounted(args.target):
        raise DeviceError(f"{args.target}: something is mounted there already")
    made = not args.target.exists()
    if not made and not args.target.is_dir():
        raise DeviceError(f"{args.target}: not a directory, so nothing can be mounted there")
    deadline = time.monotonic() + args.timeout
    config, device_id = config_of(args.source, args)
    service = device_service_from(args)
    device = None
    try:
        _make_directory(args.target)
        timeout_s = max(LEAST_ATTACH_S, deadline - time.monotonic())
        device = service.attach(config, device_id, timeout_s=timeout_s, served=args.served)
        service.mount(device, args.target.resolve())
    except BaseException:
        if device is not None:
            _detach_if_unused(service, device)
        else:
            forget_config(service, config)
        if made and args.target.is_dir():
            args.target.rmdir()
        raise
    facts = {"id": device.device_id, "path": str(device.path), "target": str(args.target.resolve())}
    answer(args, facts, f"{args.target}: {device.path}, read-only")
    return 0


def _make_directory(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(f"{target}: cannot make the directory: {error.strerror}") from error


def run_umount(args: argparse.Namespace) -> int:
    """Unmount and detach."""
    from obdlab.system.mount import mount_at, unmount

    service = device_service_from(args)
    entry = mount_at(args.target)
    if entry is None:
        raise DeviceError(f"{args.target}: not mounted")
    device = next((each for each in service.list() if str(each.path) == entry.source), None)
    if device is None:
        raise DeviceError(
            f"{args.target}: not a mount of obdlab's (got {entry.fs_type} on {entry.source}, wanted a device of "
            f"{args.run_dir})"
        )
    unmount(args.target)
    detached = _detach_if_unused(service, device)
    facts = {"target": str(args.target), "id": device.device_id, "path": str(device.path), "detached": detached}
    end = "detached" if detached else "still in use elsewhere"
    answer(args, facts, f"{args.target}: unmounted, {device.path} {end}")
    return 0


# A device that is also mounted elsewhere stays until its last umount.
def _detach_if_unused(service: DeviceService, device: AttachedDevice) -> bool:
    if not service.release(device.device_id):
        return False
    forget_config(service, device.config)
    return True
