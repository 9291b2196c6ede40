"""``obdlab layer resize``: a larger disk for a writable layer, or for a device in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, device_service_from
from obdlab.cli.jsonoutput import add_json_option, report
from obdlab.cli.packing import add_layer_arguments, layer_files, size_argument, size_text
from obdlab.errors import DeviceError
from obdlab.system.programs import ProgramError
from obdlab.system.programs import run as run_program

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

_RESIZE_TIMEOUT_S = 3600.0


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Grows the disk that a writable layer makes, with or without layers below; if it is attached, the device "
        "grows too, in use or not. The file system on it is as large as before: with --filesystem, or resize2fs "
        "(xfs_growfs) on the device, it follows. Disks never shrink."
    )
    add_layer_arguments(parser, "data file of the writable layer, or the id or node of its device")
    parser.add_argument(
        "--vsize", type=size_argument, required=True, metavar="SIZE", help="new size in bytes, or as 512M, 64G, 1T"
    )
    parser.add_argument("--filesystem", action="store_true", help="grow the ext4 on the attached device as well")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    add_json_option(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Resize."""
    from obdlab.server.live import LiveDevice, find_by_upper, find_device

    service = device_service_from(args)
    try:
        device = find_device(service, args.data) or find_by_upper(service, args.data)
    except PermissionError:  # the run directory is another user's
        device = None
    if device is not None:
        before = LiveDevice(service, device.device_id).resize(args.vsize)
        if args.filesystem:
            grow_filesystem(device.path)
    elif args.filesystem:
        raise DeviceError(f"{args.data}: no device of this run directory, so its file system cannot be grown")
    else:
        before = _resize_here(args)
    report(
        args,
        f"{args.data}: a disk of {size_text(args.vsize)} (was {size_text(before)})",
        {"layer": args.data, "size": args.vsize, "size_before": before},
    )
    return 0


def _resize_here(args: argparse.Namespace) -> int:
    from obdlab.layers.upper import open_upper

    files = layer_files(args)
    with open_upper(files.data, files.index) as upper:
        before = upper.virtual_size
        upper.set_virtual_size(args.vsize)
        upper.flush()
    return before


def grow_filesystem(device: Path) -> None:
    """Grow the ext4 on a device to the device's size. Raises DeviceError."""
    # A mounted file system is known to be in order; an unmounted one must be checked first.
    from obdlab.system.mount import mounts_of

    if not mounts_of(device):
        _run_tool("e2fsck", "-f", "-p", str(device), fine=(0, 1))
    _run_tool("resize2fs", str(device))


def _run_tool(*command: str, fine: tuple[int, ...] = (0,)) -> None:
    try:
        run_program(command, _RESIZE_TIMEOUT_S, fine=fine)
    except ProgramError as error:
        said = error.last_line
        hint = " (a mounted ext4 grows only with CAP_SYS_RESOURCE)" if "Permission denied" in said else ""
        raise DeviceError(f"the disk has grown, its file system has not: {command[0]}: {said}{hint}") from error
