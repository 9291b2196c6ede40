"""``obdlab device snapshot``: live snapshots of writable devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, device_service_from
from obdlab.cli.jsonoutput import add_json_option, report
from obdlab.errors import DeviceError, ObdlabError

if TYPE_CHECKING:
    import argparse

    from obdlab.layerfiles.snapshot import Snapshot
    from obdlab.server.client import AttachedDevice, DeviceService

_DESCRIPTION = """\
Seals the writable layer of a device in use, and continues in a fresh one above it: the disk's present content stays
as it is, in a layer of its own. Writes wait some milliseconds. NEW_CONFIG is a config.v1.json with the device's
lowers, its present writable layer's data file above them, and an upper of its own, made with "obdlab layer create".
It takes the place of the device's config. With --data, this command makes layer and config. Killing the command once
the snapshot has begun does not stop the snapshot: the device's config shows whether it was taken."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument("device", metavar="DEVICE", help="its id, or its node such as /dev/loop3")
    parser.add_argument("new_config", nargs="?", type=Path, metavar="NEW_CONFIG", help="config with the fresh layer")
    parser.add_argument("--data", type=Path, metavar="FILE", help="make the fresh layer's data file")
    parser.add_argument(
        "--index", type=Path, metavar="FILE", help="with --data: its index file (without: a sparse layer)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    add_json_option(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run)


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
    text = f"{device.device_id}: {done.sealed} is sealed, writes waited {done.paused_s * 1000:.0f} ms"
    report(args, text, {"id": device.device_id, "sealed": str(done.sealed), "paused_s": done.paused_s})
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
