"""``obdlab serve snapshot-api``: the original's HTTP interface for live snapshots."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from obdlab.cli.common import add_runtime_options, device_service_from, need_root
from obdlab.observe import stacks

_DESCRIPTION = """\
Takes live snapshots by HTTP requests, POST /snapshot with a JSON object of "dev_id" (a device of the run directory)
and "config", until SIGTERM or Ctrl-C. It listens on a unix socket, for root and its own user; on TCP requests need a
token, "Authorization: Bearer TOKEN". The causes of failures are in its log alone."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "--address",
        metavar="PLACE",
        help="where to listen: http://HOST:PORT, or a path (default: that of the settings, or snapshot-api.sock in "
        "the run directory)",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="has the token for requests over TCP; made if it is missing (default: snapshot-api.token in the run "
        "directory)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="configurations and layers may also lie below this directory; repeatable",
    )
    parser.add_argument(
        "--open",
        action="store_true",
        help="take requests as the original does: any verb, parameters in the query, and no token",
    )
    parser.add_argument("--end-with-parent", type=int, metavar="PID", help=argparse.SUPPRESS)
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    need_root("has the devices of root's run directory take snapshots")
    from obdlab.server.live import LiveDevice, find_device
    from obdlab.server.snapshotaccess import API_SOCKET_NAME, TOKEN_NAME, check_paths, read_token
    from obdlab.server.snapshotapi import SnapshotApi, UnknownDeviceError

    if args.end_with_parent:
        from obdlab.system.processes import end_with_parent

        if not end_with_parent(args.end_with_parent, signal.SIGTERM):
            return 0
    stacks.dump_on_signal()
    service = device_service_from(args)
    service.run_dir.create()
    roots = [root.absolute() for root in args.root]

    def take(dev_id: str, config: str) -> None:
        device = find_device(service, dev_id)
        if device is None:
            raise UnknownDeviceError(f"{dev_id}: no device of this run directory ({args.run_dir})")
        LiveDevice(service, device.device_id).snapshot(check_paths(device.config, Path(config), roots))

    place = args.address or service.settings.snapshot_api_address or str(service.run_dir.path / API_SOCKET_NAME)
    is_path = place.startswith("/")
    open_to_all = args.open or service.settings.snapshot_api_open
    token = ""
    if not is_path and not open_to_all:
        token = read_token(args.token_file or service.run_dir.path / TOKEN_NAME)
    with SnapshotApi(Path(place) if is_path else place, take, token=token, open_to_all=open_to_all) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"listening on {server.url}", flush=True)
        server.serve_forever()
    return 0
