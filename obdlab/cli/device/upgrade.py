"""``obdlab device upgrade``: serve devices in use with the code that is installed now."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, device_service_from
from obdlab.cli.jsonoutput import add_json_option, print_json
from obdlab.errors import DeviceError, ObdlabError
from obdlab.observe.printable import printable

if TYPE_CHECKING:
    import argparse

_NO_SERVER = "graduated, has no server to be replaced"


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Replaces the processes that serve the devices, all of them if none is named, by ones of the installed "
        "package, while file systems are mounted from them: their users see a short pause and no error. Also for "
        "a device whose keeper was killed, and with --force for one whose server hangs. If a new server cannot "
        "be started the old one goes on (exit status 1). FUSE and loop devices need Linux 6.9 for it."
    )
    parser.add_argument("device", nargs="*", metavar="DEVICE", help="id, or node such as /dev/loop3")
    parser.add_argument("--force", action="store_true", help="also those that run the installed code already")
    add_json_option(parser, "print the results as one JSON array")
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Upgrade one after the other; print what was done."""
    service = device_service_from(args)
    alive = [device for device in service.list() if device.alive]
    devices = {device.device_id: str(device.path) for device in alive}
    unchanged = {each.device_id: _NO_SERVER if each.graduated else "runs the installed code" for each in alive}
    by_node = {node: device_id for device_id, node in devices.items()}
    chosen = [by_node.get(name, name) for name in args.device] or list(devices)
    for name in chosen:
        if name not in devices:
            raise DeviceError(f"{name}: no device of this run directory ({args.run_dir})")
    failed = 0
    results = []
    for device_id in chosen:
        try:
            done = service.upgrade(device_id, force=args.force)
        except ObdlabError as error:
            print(f"{args.prog}: {printable(str(error))}", file=sys.stderr)
            failed += 1
            results.append({"id": device_id, "upgraded": False, "error": str(error)})
        else:
            results.append({"id": device_id, "upgraded": done})
            if not args.json:
                print(f"{device_id}: {'upgraded' if done else unchanged[device_id]}")
    if args.json:
        print_json(results)
    return 1 if failed else 0
