"""``obdlab trace watch``, ``import`` and ``timeline``: the kernel's block events of a disk's reads, explained."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.cli.common import add_runtime_options, add_trace_option, device_service_from
from obdlab.cli.jsonoutput import add_json_option, answer, print_json
from obdlab.cli.numbers import real
from obdlab.cli.sources import add_source_options
from obdlab.cli.trace.container_start import run_mounted
from obdlab.cli.trace.recorded_start import (
    add_start_options,
    device_of,
    listening,
    signals,
    wait,
)
from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.contrib.traces_extra.blockevents import DiskRead
    from obdlab.contrib.traces_extra.timeline import Step, Summary
    from obdlab.formats.trace import Trace
    from obdlab.layers.stack import Stack

_LONGEST = 10
_MOST_BYTES = 1 << 30


def declare_watch(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Writes the kernel's block events (tracefs) of a device to a file, as text. Of an image, starts it as "
        "record does, but records nothing: its trace or hot layer, or --trace, is replayed as in any start."
    )
    parser.add_argument("source", metavar="DEVICE|IMAGE", help="a device's id or node; an image as for attach")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the events go")
    add_trace_option(parser)
    add_start_options(parser)
    parser.set_defaults(run=run_watch)


def declare_import(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "The events are lines of text: of tracefs, trace-cmd report, perf script, a bpftrace program that prints "
        "such lines, or blkparse. Reads of the disk become reads of the image's layers, in their order."
    )
    _add_events(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the trace goes")
    add_json_option(parser)
    parser.set_defaults(run=run_import)


def declare_timeline(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Follows block events to the files and layers of the image. Prints the reads that waited longest, the share "
        "of the reads that the trace had, and the least possible time."
    )
    _add_events(parser)
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="the trace that was replayed meanwhile (default: the image's hot layer)",
    )
    parser.add_argument(
        "--there-within", type=real(), default=2.0, metavar="MS", help="a read that took less was there (default: 2)"
    )
    parser.add_argument(
        "--rate-mbit", type=real(above=0), metavar="N", help="of the link: say what the least possible is"
    )
    parser.add_argument("--rtt-ms", type=real(), default=0.0, metavar="N", help="of the link (default: 0)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--steps", action="store_true", help="every read, in order (default: the longest waits)")
    form.add_argument("--csv", action="store_true", help="every read, as CSV")
    add_json_option(form, "every read and the summary, as one JSON object")
    parser.set_defaults(run=run_timeline)


def _add_events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="EVENTS", help="a file with block events")
    parser.add_argument("image", metavar="IMAGE", help="the image that was on the device, as for attach")
    parser.add_argument(
        "--block-device", type=_device, metavar="MAJOR:MINOR", help="which one, if the events are of several"
    )
    add_runtime_options(parser)
    add_source_options(parser)


def _device(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(":")
    if not (major.isdecimal() and minor.isdecimal()):
        raise argparse.ArgumentTypeError(f"wanted MAJOR:MINOR, as 7:0 (got {text!r})")
    return int(major), int(minor)


def run_watch(args: argparse.Namespace) -> int:
    """Watch one device, or one start."""
    service = device_service_from(args)
    device = device_of(args, service)
    with signals() as ended:
        if device is None:
            end = run_mounted(args, service, ended)
        else:
            ended.looked_at = True
            with listening(device.path, args.output):
                wait(ended, None if args.until_signal else args.seconds, args.quiet, "watching")
            end = None
    if args.json or not args.quiet:
        why = "" if end is None else f" ({end.why})"
        count = len(_parsed(args.output))
        facts = {"output": str(args.output), "events": count, "end": "" if end is None else end.why}
        answer(args, facts, f"{args.output}: {count} block events{why}")
    return 0 if end is None else end.status(f"{args.output} has what came until then")


def run_import(args: argparse.Namespace) -> int:
    """Write a trace of block events."""
    from obdlab.cli.sources import opened_disk
    from obdlab.cli.trace.sets_command import save_trace
    from obdlab.contrib.traces_extra.timeline import check_inside, trace_of

    reads = _reads(args)
    with opened_disk([args.image], args) as disk:
        check_inside(reads, disk.size, name=str(args.file))
        trace = trace_of(reads, disk)
    if not len(trace):
        raise FormatError("nothing of the image's layers was read", blob=str(args.file), got=f"{len(reads)} reads")
    save_trace(args, trace)
    return 0


def run_timeline(args: argparse.Namespace) -> int:
    """Print the reads in order, or the ones that waited longest."""
    from obdlab.cli.sources import opened_disk
    from obdlab.contrib.traces_extra.timeline import summary, timeline

    reads = _reads(args)
    with opened_disk([args.image], args) as disk:
        trace = _trace(args, disk)
        steps = timeline(reads, disk, trace, there_within_ms=args.there_within)
        facts = summary(steps, disk, trace)
    if args.json:
        _print_json(steps, facts)
    elif args.csv:
        _print_csv(steps)
    else:
        longest = sorted(steps, key=lambda step: -(step.took_ms or 0))[:_LONGEST]
        print("      ms    took what             offset    length process          layer file")
        for step in steps if args.steps else sorted(longest, key=lambda step: step.at_ms):
            print(_line(step))
        print(*_summary_lines(facts, args), *_kind_lines(steps), sep="\n")
    return 0


def _trace(args: argparse.Namespace, disk: Stack) -> Trace | None:
    from obdlab.formats.trace import Trace
    from obdlab.traces.hotlayer import trace_of_hot_layer
    from obdlab.traces.replay import load_file, reads_in

    if args.trace is None:
        return trace_of_hot_layer(disk)
    return Trace.from_reads(reads_in(load_file(str(args.trace)), disk, name=str(args.trace)))


def _reads(args: argparse.Namespace) -> list[DiskRead]:
    from obdlab.contrib.traces_extra import blockevents

    events = _parsed(args.file)
    device = args.block_device or blockevents.device_of(events, name=str(args.file))
    reads = blockevents.reads_of(events, device)
    if not reads:
        raise FormatError("no reads of the device", blob=str(args.file), wanted=f"{device[0]}:{device[1]}")
    return reads


def _parsed(path: Path) -> list[Any]:
    from obdlab.contrib.traces_extra.blockevents import parse
    from obdlab.formats.trace import MAGIC_SIZE, is_trace

    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise FormatError("too large for block events", blob=str(path), got=size, wanted=f"at most {_MOST_BYTES}")
        if not path.is_file():  # open() would wait for a pipe's writer
            raise FormatError("not a regular file", blob=str(path))
        with open(path, "rb") as file:
            if is_trace(file.read(MAGIC_SIZE)):
                raise FormatError(
                    "a trace", blob=str(path), wanted="block events, as obdlab trace watch writes (see: trace show)"
                )
        with open(path, errors="replace") as lines:
            return parse(lines, name=str(path))
    except OSError as error:
        raise FormatError(f"cannot read it: {error.strerror}", blob=str(path)) from error


def _line(step: Step) -> str:
    from obdlab.cli.trace.files_command import name_of

    took = "       ?" if step.took_ms is None else f"{step.took_ms:8.2f}"
    what = step.state + (" (ahead)" if step.is_ahead else "")
    layers = ",".join(map(str, step.layers)) or "-"
    where = f"{step.offset:>11} {step.length:>9}"
    return f"{step.at_ms:8.1f}{took} {what:<12} {where} {step.process:<16} {layers:>5} {name_of(step.path)}"


def _summary_lines(facts: Summary, args: argparse.Namespace) -> list[str]:
    sizes = f"{facts.size} bytes ({facts.stored_size} as stored)"
    lines = [
        f"{facts.reads} reads of the disk, {sizes}, of {facts.files} files by {facts.processes} processes",
        f"{facts.waited_ms:.1f} of {facts.span_ms:.1f} ms passed waiting for some read",
    ]
    if facts.coverage is not None:
        unread = facts.over_read or 0.0
        lines.append(f"the trace had {facts.coverage:.1%} of the bytes read; {unread:.1%} of the trace was not read")
    if args.rate_mbit:
        link = f"{args.rate_mbit:g} Mbit/s and {args.rtt_ms:g} ms"
        lines.append(f"to fetch it at {link} takes at least {facts.optimum_ms(args.rate_mbit, args.rtt_ms):.1f} ms")
    return lines


def _kind_lines(steps: Sequence[Step]) -> list[str]:
    from obdlab.contrib.traces_extra.timeline import by_kind

    return [
        f"  {kind:<12} {share.steps:>5} pieces {share.size:>10} bytes, waited for {share.waited_ms:.1f} ms"
        for kind, share in by_kind(steps).items()
    ]


def _print_json(steps: Sequence[Step], facts: Summary) -> None:
    from dataclasses import asdict

    from obdlab.contrib.traces_extra.timeline import as_dict, by_kind

    kinds = {kind: asdict(share) for kind, share in by_kind(steps).items()}
    print_json({"summary": asdict(facts), "kinds": kinds, "steps": [as_dict(step) for step in steps]})


def _print_csv(steps: Sequence[Step]) -> None:
    from obdlab.contrib.traces_extra.timeline import as_dict

    rows = [as_dict(step) | {"layers": " ".join(map(str, step.layers))} for step in steps]
    writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
