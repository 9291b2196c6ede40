"""``obdlab device attach``, ``detach`` and ``list``: images as block devices, without mounting them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import (
    add_device_option,
    add_runtime_options,
    add_trace_option,
    device_service_from,
)
from obdlab.cli.jsonoutput import add_json_option, answer, print_json
from obdlab.cli.numbers import real
from obdlab.cli.sources import SOURCE_HELP, add_source_options, config_of, forget_config, made_config_path
from obdlab.errors import DeviceError, ObdlabError

if TYPE_CHECKING:
    import argparse

    from obdlab.server.client import AttachedDevice, DeviceService

_TIMEOUT_HELP = "wait so many seconds, for a registry that does not answer too, then give up (default: %(default)g)"
#: Transient states (``DeviceState``).
_PASSING = ("without keeper", "restarting")
#: A listing reports requests that have been under way for longer.
_LONG_WAIT_S = 5.0
#: Time left for the attach itself, even if waiting for the registry used up the deadline.
LEAST_ATTACH_S = 1.0


def add_attach_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for attaching an image."""
    add_device_option(parser)
    parser.add_argument(
        "--served",
        action="store_true",
        help="serve it even if an unpacked copy is on this host: so its reads can be recorded",
    )
    parser.add_argument("--timeout", type=real(above=0), default=150.0, metavar="S", help=_TIMEOUT_HELP)
    add_runtime_options(parser)
    add_source_options(parser)
    add_trace_option(parser)


def declare_attach(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Prints the device's node. See also: mount."
    parser.add_argument("source", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--id", help="name of the device (default: made from the image)")
    add_json_option(parser, "print id and node as one JSON object")
    add_attach_options(parser)
    parser.set_defaults(run=run_attach)


def declare_detach(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("device", help="its id, or its node such as /dev/loop3")
    add_json_option(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run_detach)


def declare_list(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_json_option(parser, "one JSON object a line, with counters")
    add_runtime_options(parser)
    parser.set_defaults(run=run_list)


def run_attach(args: argparse.Namespace) -> int:
    """Attach; print the node."""
    if args.id == "":
        raise DeviceError("--id: empty (wanted a name; without the option one is made from the image)")
    deadline = time.monotonic() + args.timeout
    config, device_id = config_of(args.source, args)
    service = device_service_from(args)
    try:
        timeout_s = max(LEAST_ATTACH_S, deadline - time.monotonic())
        device = service.attach(config, args.id or device_id, timeout_s=timeout_s, served=args.served)
    except BaseException:
        forget_config(service, config)
        raise
    answer(args, {"id": device.device_id, "path": str(device.path)}, str(device.path))
    return 0


def run_detach(args: argparse.Namespace) -> int:
    """Detach."""
    from obdlab.devices.usage import STARTS_END_S

    service = device_service_from(args)
    named = next((each for each in service.list() if args.device in (each.device_id, str(each.path))), None)
    missing = DeviceError(f"{args.device}: no device of this run directory ({args.run_dir})")
    if args.device.startswith("/") and named is None:
        raise missing
    device_id = args.device if named is None else named.device_id
    gone = service.detach(device_id, patience_s=STARTS_END_S)
    forget_config(service, made_config_path(args.run_dir, device_id) if named is None else named.config)
    if not gone:
        raise missing
    answer(args, {"id": device_id, "detached": True}, f"{device_id}: detached")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """List the devices, one a line."""
    service = device_service_from(args)
    for device in service.list():
        counters = _counters_of(service, device) if device.alive and not device.graduated else {}
        if args.json:
            known = {"id": device.device_id, "path": str(device.path), "size": device.size, "pid": device.pid}
            known |= {"read_only": device.read_only, "config": str(device.config), "alive": device.alive}
            known |= {"kind": device.kind, "keeper_pid": device.keeper_pid, "restarts": device.restarts}
            known |= {"graduated": device.graduated, "state": device.state}
            print_json(known | counters)
        else:
            mode = "ro" if device.read_only else "rw"
            state = f"pid {device.pid}{_trouble(counters)}" if device.alive else "server dead"
            if device.state in _PASSING:
                state += f"  {device.state}"
            state = "graduated" if device.graduated else state
            what = f"{device.size >> 20} MiB  {mode}  {device.kind}"
            print(f"{device.device_id}  {device.path}  {what}  {state}  {device.config}")
    return 0


# A server that hangs or is being replaced must not keep the other devices from being listed.
def _counters_of(service: DeviceService, device: AttachedDevice) -> dict[str, Any]:
    try:
        return service.statistics(device.device_id)
    except ObdlabError as error:
        return {"unanswered": str(error)}


def _trouble(counters: dict[str, Any]) -> str:
    if "unanswered" in counters:
        return " (does not answer)"
    longest_s = max(counters.get("under_way_s", ()), default=0.0)
    return f" (a request has waited {longest_s:.0f} s)" if longest_s >= _LONG_WAIT_S else ""
