"""``obdlab snapshot`` and ``obdlab snapshot-api``: live snapshots of writable devices."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_runtime_options, device_service_from, need_root
from obdlab.cli.packing import say
from obdlab.errors import DeviceError, ObdlabError
from obdlab.observe import stacks

if TYPE_CHECKING:
    import argparse

    from obdlab.layerfiles.snapshot import Snapshot
    from obdlab.server.client import AttachedDevice, DeviceService

_DESCRIPTION = """\
Seals the writable layer of a device in use, and goes on in a fresh one above it: what the disk holds at this moment
stays as it is, in a layer of its own. Writes wait some milliseconds. NEW_CONFIG is a config.v1.json with the device's
lowers, its present writable layer's data file above them, and an upper of its own, made with "obdlab create"; it
takes the place of the device's config. Instead, --data has layer and config made. A command that is killed once its
snapshot has begun does not stop it: see what the device's config names."""

_API_DESCRIPTION = """\
Takes live snapshots by HTTP requests, POST /snapshot with a JSON object of "dev_id" (a device of the run directory)
and "config", until SIGTERM or Ctrl-C. It listens on a unix socket, for root and its own user; on TCP requests need a
token, "Authorization: Bearer TOKEN". The causes of failures are in its log alone."""


def add(subcommands: Any) -> None:
    """Declare the commands."""
    parser = subcommands.add_parser(
        "snapshot", help="take a live snapshot of a writable device", description=_DESCRIPTION
    )
    parser.add_argument("device", metavar="DEVICE", help="its id, or its node such as /dev/loop3")
    parser.add_argument("new_config", nargs="?", type=Path, metavar="NEW_CONFIG", help="config with the fresh layer")
    parser.add_argument("--data", type=Path, metavar="FILE", help="make the fresh layer's data file")
    parser.add_argument(
        "--index", type=Path, metavar="FILE", help="with --data: its index file (without: a sparse layer)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    add_runtime_options(parser)
    parser.set_defaults(run=run)

    api = subcommands.add_parser(
        "snapshot-api", help="the original's HTTP interface for live snapshots", description=_API_DESCRIPTION
    )
    api.add_argument(
        "--address",
        metavar="PLACE",
        help="where to listen: http://HOST:PORT, or a path (default: that of the settings, or snapshot-api.sock in "
        "the run directory)",
    )
    api.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="has the token for requests over TCP; made if it is missing (default: snapshot-api.token in the run "
        "directory)",
    )
    api.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="configurations and layers may also lie below this directory; repeatable",
    )
    api.add_argument(
        "--open",
        action="store_true",
        help="take requests as the original does: any verb, parameters in the query, and no token",
    )
    add_runtime_options(api)
    api.set_defaults(run=run_api)


def run(args: argparse.Namespace) -> int:
    """Take one snapshot."""
    from obdlab.server.live import find_device

    if (args.new_config is None) == (args.data is None) or (args.index and not args.data):
        raise DeviceError("either NEW_CONFIG, or --data and perhaps --index")
    service = device_service_from(args)
    device = find_device(service, args.device)
    if device is None:
        raise DeviceError(f"{args.device}: no device of this run directory ({args.run_dir})")
    done = (
        _with_config(service, device, args.new_config) if args.new_config else _with_new_layer(service, device, args)
    )
    say(f"{device.device_id}: {done.sealed} is sealed, writes waited {done.paused_s * 1000:.0f} ms", quiet=args.quiet)
    return 0


def _with_config(service: DeviceService, device: AttachedDevice, config: Path) -> Snapshot:
    from obdlab.server.live import LiveDevice

    return LiveDevice(service, device.device_id).snapshot(config)


# Removes the files made for a snapshot that fails.
def _with_new_layer(service: DeviceService, device: AttachedDevice, args: argparse.Namespace) -> Snapshot:
    from obdlab.layerfiles.snapshot import make_next
    from obdlab.server.wire import NoAnswerError

    config = make_next(device.config, args.data, args.index)
    path = args.data.with_name(f"{args.data.name}.config.v1.json")
    try:
        config.save(path)
        return _with_config(service, device, path)
    except NoAnswerError:  # the server may still take the snapshot
        raise
    except ObdlabError:
        for made in (path, Path(config.upper.data), Path(config.upper.index)):
            made.unlink(missing_ok=True)
        raise


def run_api(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    need_root("has the devices of root's run directory take snapshots")
    from obdlab.server.live import LiveDevice, find_device
    from obdlab.server.snapshotaccess import API_SOCKET_NAME, TOKEN_NAME, check_paths, read_token
    from obdlab.server.snapshotapi import SnapshotApi, UnknownDeviceError

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
