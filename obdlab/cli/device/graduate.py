"""``obdlab device graduate``: detach a read-only device from its server, for good."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, device_service_from
from obdlab.cli.jsonoutput import add_json_option, answer
from obdlab.cli.progressbar import shown_bar
from obdlab.errors import DeviceError

if TYPE_CHECKING:
    import argparse


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.description = (
        "Unpacks the image of a read-only device to a plain file in the cache directory, checking every byte, "
        "and puts that in the place of the device's server, without a pause for its users. All layers must be "
        "local files or in the cache whole (--download does that). Costs as much disk as the image has data "
        "unpacked, once for all devices of the image. A device with ext4 or xfs mounted must have been attached "
        'with "graduation" or "completion" on (docs/reference/configuration.md), which do all of this by themselves.'
    )
    parser.add_argument("device", metavar="DEVICE", help="id, or node such as /dev/loop3")
    parser.add_argument("--low-priority", action="store_true", help="run at the lowest priority")
    add_json_option(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unpack and switch; print the result."""
    from obdlab.server.live import find_device
    from obdlab.server.unpacking import graduate

    service = device_service_from(args)
    device = find_device(service, args.device)
    if device is None:
        raise DeviceError(f"{args.device}: no device of this run directory ({args.run_dir})")
    if args.low_priority:
        _be_modest()
    with shown_bar(f"{device.device_id}: unpacking", None, quiet=args.json) as bar:

        def report(done: int, size: int) -> None:
            bar.total = size
            bar.update(done - bar.n)

        done = graduate(service.run_dir, device.device_id, report)
    facts = {"id": device.device_id, "path": str(device.path), "disk": str(done.path), "disk_bytes": done.disk_bytes}
    text = f"{device.device_id}: {device.path} goes on with {done.path} ({done.disk_bytes >> 20} MiB on disk)"
    answer(args, facts, text)
    return 0


# A device's server starts this process, which inherits blocked signals and protection from the OOM killer.
def _be_modest() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with suppress(OSError):
        os.nice(19)
        Path("/proc/self/oom_score_adj").write_text("500")
