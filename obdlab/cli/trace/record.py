"""``obdlab trace record``: of a device in use, or of an image in a container made for it."""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.common import add_runtime_options, device_service_from
from obdlab.cli.jsonoutput import add_json_option, answer, print_json
from obdlab.cli.trace.container_start import container_config, run_once
from obdlab.cli.trace.recorded_start import (
    RecordError,
    add_start_options,
    check_outputs,
    device_of,
    listening,
    mounted,
    signals,
    wait,
)
from obdlab.system.pauses import wait_until

if TYPE_CHECKING:
    import argparse

    from obdlab.cli.trace.recorded_start import EndAsked
    from obdlab.server.client import AttachedDevice, DeviceService
    from obdlab.server.live import LiveDevice
    from obdlab.server.messages import Recorded

_WRITTEN_S = 60.0
# A server looks for the lock once a second.
_LOOKED_FOR_S = 5.0


def declare_record(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Of a device, records its reads from now on, without disturbing it; the kernel does not read again blocks "
        "that it has cached. Of an image, attaches it, runs its command (or that of --run) once in a container of "
        "runc, with a loopback network, and records from the first read on. Ends after --seconds, at a signal "
        "(SIGINT, SIGTERM, SIGUSR1), when the container ends, or as soon as it is ready: a line of its output holds "
        "--until-line, or --until-command succeeds in it."
    )
    parser.add_argument("source", metavar="DEVICE|IMAGE", help="a device's id or node; an image as for attach")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the trace goes")
    parser.add_argument(
        "--events",
        type=Path,
        metavar="FILE",
        help="also write down the kernel's block events there: when, by which process, for how long (see: timeline)",
    )
    add_start_options(parser)
    parser.set_defaults(run=run)


def declare_start(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = "Returns at once. The device's server records: it goes on when this command has ended."
    parser.add_argument("device", metavar="DEVICE", help="its id or node")
    add_json_option(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run_start)


def declare_stop(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("device", metavar="DEVICE", help="its id or node")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the trace goes")
    parser.add_argument("-q", "--quiet", action="store_true", help="no summary")
    add_json_option(parser)
    parser.set_defaults(run=run_stop)
    add_runtime_options(parser)


def run(args: argparse.Namespace) -> int:
    """Record one device, or one start."""
    service = device_service_from(args)
    device = device_of(args, service)
    with signals() as ended:
        if device is not None:
            return _record_device(args, service, device, ended)
        return _record_image(args, service, ended)


def run_start(args: argparse.Namespace) -> int:
    """Begin to record a device."""
    live = _live(args)
    live.start_recording()
    if args.json:
        print_json({"id": live.device_id})
    return 0


def run_stop(args: argparse.Namespace) -> int:
    """Write the trace recorded of a device."""
    live = _live(args)
    check_outputs([args.output])
    _summarise(live.stop_recording(args.output), args)
    return 0


def _live(args: argparse.Namespace) -> LiveDevice:
    from obdlab.server.live import LiveDevice, find_device

    service = device_service_from(args)
    device = find_device(service, args.device)
    if device is None:
        raise RecordError(f"{args.device}: no device of this run directory ({args.run_dir})")
    return LiveDevice(service, device.device_id)


# -- a device in use -------------------------------------------------------------------------------------------------


def _record_device(args: argparse.Namespace, service: DeviceService, device: AttachedDevice, ended: EndAsked) -> int:
    from obdlab.server.live import LiveDevice

    live = LiveDevice(service, device.device_id)
    ended.looked_at = True
    live.start_recording()
    try:
        with listening(device.path, args.events):
            wait(ended, None if args.until_signal else args.seconds, args.quiet)
    finally:
        done = live.stop_recording(args.output)
    _summarise(done, args)
    return 0


def _summarise(done: Recorded, args: argparse.Namespace) -> None:
    facts = {"output": str(args.output), "reads": done.reads, "size": done.size, "left_out": done.left_out}
    answer(args, facts, f"{args.output}: {done.reads} reads, {done.size} bytes")
    if done.left_out:
        print(f"{args.prog}: {done.left_out} reads came after the trace was full", file=sys.stderr)


# -- a start of an image ---------------------------------------------------------------------------------------------


def _record_image(args: argparse.Namespace, service: DeviceService, ended: EndAsked) -> int:
    from dataclasses import replace

    from obdlab.cli.sources import image_config
    from obdlab.image.config import LowerConfig
    from obdlab.server.capture.directories import place_for_start

    document = container_config(args)
    with (
        ExitStack() as left,
        image_config([args.source], args) as image,
        place_for_start(service.run_dir, "record") as place,
    ):
        trace = place / "trace"
        trace.touch()
        if image.acceleration_layer:
            image = replace(image, acceleration_layer=False, lowers=image.lowers[:-1])
        # Record a start without a hot layer or trace, over the layers that all users of the image have.
        image = replace(image, record_trace_path=str(trace), trace=LowerConfig())
        config = place / "config.v1.json"
        image.save(config)
        # A server that is killed writes no trace: recording ends before.
        with mounted(service, config, place / "image", args.events, lambda: _end_recording(trace)) as release:
            end = run_once(args, place, document, ended, release)
        _await_trace(trace)
        try:
            shutil.copyfile(trace, args.output)
        except OSError as error:
            raise RecordError(f"{args.output}: cannot write the trace: {error.strerror or error}") from error
        left.callback(_summary, args, end.why)
    return end.status(f"{args.output} has what was read until then")


def _summary(args: argparse.Namespace, why: str) -> None:
    from obdlab.formats.trace import Trace

    recorded = Trace.from_bytes(args.output.read_bytes(), name=str(args.output))
    facts = {"output": str(args.output), "reads": len(recorded), "size": recorded.size, "end": why}
    answer(args, facts, f"{args.output}: {len(recorded)} reads, {recorded.size} bytes ({why})")


# The server writes the trace when the lock or the device is removed.
def _end_recording(trace: Path) -> None:
    trace.with_name(trace.name + ".lock").unlink(missing_ok=True)
    _is_written(trace, _LOOKED_FOR_S)


def _is_written(trace: Path, patience_s: float) -> bool:
    return wait_until(trace.with_name(trace.name + ".ok").exists, patience_s, look_s=0.02)


def _await_trace(trace: Path) -> None:
    if not _is_written(trace, _WRITTEN_S):
        raise RecordError(f"the trace was not written within {_WRITTEN_S:g} s (see the log of the device host)")
    if not trace.stat().st_size:
        raise RecordError("the trace is empty: nothing was read of the image's layers")
